"""Collecting a generation: draw prompts, sample groups, call the reward functions, estimate advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from grouprl import objective
from grouprl.lm.generate.samples import Samples
from grouprl.lm.generate.scored_groups import Metrics, ScoredGroups, describe, logged_means
from grouprl.lm.prompts import Prompt, PromptOrder, PromptSource
from grouprl.lm.rewards.call import RewardCaller
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.streams import Draws, Stream
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective.user_functions import TensorFunction

EVALUATION_STARTS = 1 << 48
"""The number of the first group of an evaluation: no group of a training has it."""


def kl_values(logp: Tensor, logp_ref: Tensor, estimator: str) -> Tensor:
    """``[S]``, nats: the estimate k1, k2 or k3 of KL(policy || reference) at each token, without a gradient path.

    Args:
        logp, logp_ref: ``[S]`` under the policy and under the reference. estimator: "k1", "k2" or "k3".
    """
    value = objective.DIVERGENCES[estimator].value
    assert value is not None
    return value(logp, logp_ref)


class Player(Protocol):
    """Plays out prompts: samples from the model and has the result judged. There is one for completions and one for
    episodes of several turns; collecting and evaluating do not know which they have.

    Attributes:
        names: what rewards are called: the reward functions, and what else gives rewards.
    """

    names: tuple[str, ...]

    def draw(
        self, prompts: list[Prompt], group_size: int, stream: Stream | Draws, numbers: Sequence[int],
        settings: SamplingSettings | None = None, state: Any = None,
    ) -> ScoredGroups:  # fmt: skip
        """Sample ``group_size`` times from each prompt, and call the reward functions.

        Args:
            stream: where the random numbers of sampling come from.
            numbers: a number for each group, from which its start is drawn where it is random.
            settings: how to sample; default: as the policy's configuration says.
            state: the trainer's state, handed to reward functions.

        Raises UsageError or TrainingError if a reward function fails or returns something else than numbers.
        """

    def returns(self, groups: Any) -> Tensor:
        """``[N]`` what is learned from: the rewards of each, with what the settings add to them for its length."""

    def samples(self, groups: Any, own: TensorFunction | None) -> Samples:
        """What is learned from groups that it has drawn; ``own`` is a user's advantage function."""

    def judged_by(self, rewards: RewardCaller) -> Player:
        """The same, judged by other reward functions."""

    def close(self) -> None:
        """Release what it has made to play with; it makes that anew when it plays again."""


class Collector:
    """Turns prompts into samples to learn from.

    Args:
        player: samples from the model, and scores what it samples.
        source, order: the prompts, and the order in which to draw them.
        stream: the random stream of the sampler. own: a user's advantage function, in the place of the settings'.
    """

    def __init__(
        self, player: Player, source: PromptSource, order: PromptOrder, config: GRPOConfig, stream: Stream,
        own: TensorFunction | None = None,
    ) -> None:  # fmt: skip
        self.own = own
        self.player, self.config = player, config
        self.source, self.order, self.stream = source, order, stream
        self.tokens = 0
        """Prompt and completion tokens so far, prompts counted once per completion."""

    def collect(self, n_prompts: int, group_size: int, state: Any = None) -> tuple[Samples, Metrics]:
        """A generation of ``n_prompts`` groups of ``group_size`` completions, and its metrics in TRL's names.

        With dynamic sampling (DAPO, arXiv 2503.14476) it draws further prompts until ``n_prompts`` groups have
        advantages, or the allowed number of batches is reached.

        Args:
            state: the trainer's state, handed to reward functions.

        Raises UsageError or TrainingError if a prompt cannot be used or a reward function fails.
        """
        groups = self._draw(n_prompts, group_size, state)
        rounds = [groups.rewards]
        if self.config.dynamic_sampling:
            with_signal, without = groups.split_by_signal(self.config, self.own)
            while with_signal.n_prompts < n_prompts and len(rounds) < self.config.dynamic_sampling_max_batches:
                more = self._draw(n_prompts - with_signal.n_prompts, group_size, state)
                rounds.append(more.rewards)
                more_with, more_without = more.split_by_signal(self.config, self.own)
                with_signal, without = with_signal.concatenate(more_with), without.concatenate(more_without)
            # Capped: groups without signal fill up, so that a step is never smaller than asked for.
            groups = with_signal.concatenate(without).first(n_prompts)
        samples = self.player.samples(groups, self.own)
        metrics = {**describe(groups, self.player.returns(groups)), **logged_means(rounds)}
        if self.config.beta > 0 and self.config.kl_in == "reward":
            metrics["kl"] = float(kl_values(samples.logp_old, samples.logp_ref, self.config.kl_estimator).mean())
        if samples.turns is not None and samples.turns.shared_states is not None:
            metrics["shared_states"] = samples.turns.shared_states
        if self.config.dynamic_sampling:
            metrics["dynamic_sampling/batches"] = len(rounds)
        metrics["num_tokens"] = float(self.tokens)
        return samples, metrics

    def _draw(self, n_prompts: int, group_size: int, state: Any) -> ScoredGroups:
        numbers = range(self.order.drawn, self.order.drawn + n_prompts)
        prompts = [self.source[i] for i in self.order.next_rows(n_prompts)]
        drawn = self.player.draw(prompts, group_size, self.stream, numbers, state=state)
        self.tokens += drawn.n_tokens
        return drawn

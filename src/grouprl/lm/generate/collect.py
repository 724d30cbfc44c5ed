"""Collecting a generation: draw prompts, sample groups, call the reward functions, estimate advantages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from grouprl import objective
from grouprl.lm.generate.estimate import estimate_advantages, groups_with_signal
from grouprl.lm.generate.old_policy import old_and_reference
from grouprl.lm.generate.samples import Samples
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt, PromptOrder, PromptSource
from grouprl.lm.rewards.call import RewardCaller, Rewards, total
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.streams import Draws, Stream
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective.user_functions import TensorFunction

Metrics = dict[str, float]

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


class CompletionPlayer:
    """Completions: a prompt, and what the model writes behind it.

    Args:
        policy: samples the completions. tokenizer: decodes them. rewards: scores them.
    """

    def __init__(self, policy: Policy, tokenizer: Any, rewards: RewardCaller, config: GRPOConfig) -> None:
        self.policy, self.tokenizer, self.rewards, self.config = policy, tokenizer, rewards, config
        self.names = rewards.names

    def draw(
        self, prompts: list[Prompt], group_size: int, stream: Stream | Draws, numbers: Sequence[int],
        settings: SamplingSettings | None = None, state: Any = None,
    ) -> ScoredGroups:  # fmt: skip
        """As `Player.draw`."""
        return sample_and_score(
            self.policy, self.tokenizer, self.rewards, prompts, group_size, stream, settings, state,
            skip_special_tokens=self.config.skip_special_tokens,
        )  # fmt: skip

    def returns(self, groups: ScoredGroups) -> Tensor:
        """As `Player.returns`."""
        most, cache = self.config.max_completion_length, self.config.soft_overlong_cache
        if cache is None:
            return groups.returns
        return groups.returns + objective.soft_overlong(groups.lengths, most, cache).to(groups.returns)

    def samples(self, groups: ScoredGroups, own: TensorFunction | None) -> Samples:
        """As `Player.samples`."""
        config = self.config
        completions = [c.ids for c in groups.completions]
        lengths, returns = groups.lengths, self.returns(groups)
        group = torch.arange(groups.n_prompts).repeat_interleave(groups.group_size)
        n = int(lengths.sum())
        logp_old, logp_ref, known = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        penalties = None
        if self.policy.reference is not None and config.kl_in == "reward":
            logp_old, logp_ref = old_and_reference(
                self.policy, [p.ids for p in groups.prompts], completions, group.tolist(), lengths
            )
            known = ~known
            penalties = -objective.kl_in_reward(
                torch.zeros_like(logp_old), logp_old, logp_ref, config.beta, config.kl_estimator
            )
        advantages = estimate_advantages(
            config, groups.rewards.values, self.rewards.weights, returns, lengths, group, penalties, own
        )
        return Samples(
            prompts=groups.prompts, group=group, completions=completions,
            finished=groups.finished,
            logp_sampled=torch.cat([c.logp for c in groups.completions]), texts=groups.texts,
            rewards=groups.rewards.values, returns=returns, advantages=advantages,
            logp_old=logp_old, logp_ref=logp_ref, known_old=known, known_ref=known.clone(),
            extras=groups.rewards.extras,
        )  # fmt: skip

    def judged_by(self, rewards: RewardCaller) -> CompletionPlayer:
        """As `Player.judged_by`."""
        return CompletionPlayer(self.policy, self.tokenizer, rewards, self.config)

    def close(self) -> None:
        """As `Player.close`: there is nothing."""


class ScoredGroups:
    """P groups of completions with their rewards, prompt after prompt: N = P * group_size completions in all."""

    def __init__(
        self, prompts: list[Prompt], group_size: int, completions: list[Any], texts: list[str], rewards: Rewards,
        weights: Tensor,
    ) -> None:  # fmt: skip
        self.prompts, self.group_size, self.completions = prompts, group_size, completions
        self.texts, self.rewards, self.weights = texts, rewards, weights

    @property
    def lengths(self) -> Tensor:
        """``[N]`` tokens that the model wrote."""
        return torch.tensor([len(c.ids) for c in self.completions])

    @property
    def finished(self) -> Tensor:
        """``[N]`` bool: whether the model ended by itself."""
        return torch.tensor([c.finished for c in self.completions])

    @property
    def n_tokens(self) -> int:
        """Prompt tokens, counted once for each completion, and tokens of completions."""
        return int(self.lengths.sum()) + self.group_size * sum(len(p.ids) for p in self.prompts)

    def metrics(self) -> Metrics:
        """What there is to say beside lengths and rewards."""
        return {}

    def solved(self, reward: float = 1.0, by: str | None = None) -> list[bool]:
        """``[N]`` whether each is right: its reward, or that of the function ``by``, reaches ``reward``."""
        values = self.returns if by is None else self.rewards.values[:, self.rewards.names.index(by)]
        return [bool(value >= reward - 1e-9) for value in values.tolist()]

    def leave_out_columns(self) -> None:
        """Drop the columns of the dataset, which may be large, before the groups are sent to who has the dataset."""
        self.prompts = [replace(prompt, columns={}) for prompt in self.prompts]

    def take_columns(self, rows: Sequence[Prompt]) -> None:
        """Put back what `leave_out_columns` dropped; ``rows`` are the prompts that were drawn."""
        self.prompts = [replace(own, columns=row.columns) for own, row in zip(self.prompts, rows, strict=True)]

    @property
    def n_prompts(self) -> int:
        """P."""
        return len(self.prompts)

    @property
    def returns(self) -> Tensor:
        """``[N]`` weighted sum of each completion's rewards."""
        return total(self.rewards.values, self.weights)

    def split_by_signal(self, config: GRPOConfig, own: TensorFunction | None) -> tuple[ScoredGroups, ScoredGroups]:
        """The groups with an advantage other than 0, and the groups without one."""
        signal = self.signal(config, own)
        return tuple(self._select([i for i, has in enumerate(signal) if has is wanted]) for wanted in (True, False))  # type: ignore[return-value]

    def signal(self, config: GRPOConfig, own: TensorFunction | None) -> list[bool]:
        """For each group whether it has an advantage other than 0."""
        return groups_with_signal(config, self.rewards.values, self.weights, self.group_size, own).tolist()

    def first(self, n: int) -> ScoredGroups:
        """The first n groups."""
        return self._select(list(range(n)))

    def _select(self, groups: Sequence[int]) -> ScoredGroups:
        rows = [g * self.group_size + i for g in groups for i in range(self.group_size)]
        r = self.rewards
        extras = {name: [column[i] for i in rows] for name, column in r.extras.items()}
        return type(self)(
            [self.prompts[g] for g in groups], self.group_size, [self.completions[i] for i in rows],
            [self.texts[i] for i in rows], Rewards(r.values[rows], r.names, extras, r.metrics), self.weights,
        )  # fmt: skip

    def concatenate(self, other: ScoredGroups) -> ScoredGroups:
        """The groups of both, these first."""
        a, b = self.rewards, other.rewards
        extras = {
            name: [*a.extras.get(name, [None] * len(a.values)), *b.extras.get(name, [None] * len(b.values))]
            for name in {**a.extras, **b.extras}
        }
        rewards = Rewards(torch.cat([a.values, b.values]), a.names, extras)
        return type(self)(
            self.prompts + other.prompts, self.group_size, self.completions + other.completions,
            self.texts + other.texts, rewards, self.weights,
        )  # fmt: skip


def logged_means(rounds: list[Rewards]) -> Metrics:
    """Metrics that reward functions logged with ``log_metric``: means over all completions they scored."""
    means: Metrics = {}
    for name in {name for rewards in rounds for name in rewards.metrics}:
        logged = [(r.metrics[name], len(r.values)) for r in rounds if name in r.metrics]
        means[name] = sum(value * n for value, n in logged) / sum(n for _, n in logged)
    return means


def sample_and_score(
    policy: Policy, tokenizer: Any, rewards: RewardCaller, prompts: list[Prompt], group_size: int,
    stream: Stream | Draws, settings: SamplingSettings | None = None, state: Any = None, *,
    skip_special_tokens: bool = False,
) -> ScoredGroups:  # fmt: skip
    """Sample ``group_size`` completions of each prompt and call the reward functions.

    Args:
        stream: where the random numbers come from.
        settings: how to sample; default: as the policy's configuration says.
        state: the trainer's state, handed to reward functions.
        skip_special_tokens: leave all special tokens out of the texts, and not only those that end or fill.

    Raises UsageError or TrainingError if a reward function fails or returns something else than numbers.
    """
    completions = policy.sample([p.ids for p in prompts], group_size, stream, settings)
    texts = texts_of(completions, tokenizer, skip_special_tokens)
    rows = [p for p in prompts for _ in range(group_size)]
    values = rewards(rows, texts, [c.ids for c in completions], state)
    return ScoredGroups(prompts, group_size, completions, texts, values, rewards.weights)


def texts_of(completions: Sequence[Completion], tokenizer: Any, skip_special_tokens: bool) -> list[str]:
    """What the model wrote, without the token that ended it and without padding."""
    padding = getattr(tokenizer, "pad_token_id", None)
    ids = [[t for t in (c.ids[:-1] if c.finished and not c.stopped else c.ids) if t != padding] for c in completions]
    return list(tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens))


def describe_scored(batches: Sequence[ScoredGroups]) -> Metrics:
    """TRL's metrics of completions that nothing is learned from: those of an evaluation, in several batches."""
    drawn = functools.reduce(ScoredGroups.concatenate, batches)
    return {**describe(drawn, drawn.returns), **logged_means([batch.rewards for batch in batches])}


def evaluation_metrics(functions: Sequence[str]) -> list[str]:
    """The names in what `describe_scored` gives, beside those that the reward ``functions`` log themselves."""
    lengths = [f"completions/{which}_{what}" for which in ("mean", "min", "max") for what in _LENGTHS]
    of_each = [f"rewards/{name}/{what}" for name in functions for what in ("mean", "std")]
    return ["reward", "reward_std", "frac_reward_zero_std", "completions/clipped_ratio", *lengths, *of_each]


_LENGTHS = ("length", "terminated_length")


def describe(groups: ScoredGroups, returns: Tensor) -> Metrics:
    """TRL's metrics of what was sampled; ``returns [N]`` are what it is worth."""
    lengths, finished, rewards = groups.lengths, groups.finished, groups.rewards
    ones, group = torch.ones_like(lengths), torch.arange(groups.n_prompts).repeat_interleave(groups.group_size)
    lengths = lengths.double()
    ended = lengths[finished] if bool(finished.any()) else torch.zeros(1, dtype=torch.float64)
    metrics: Metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((~finished).double().mean()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/min_terminated_length": float(ended.min()),
        "completions/max_terminated_length": float(ended.max()),
        "reward": float(returns.mean()),
        "reward_std": float(returns.std()) if len(returns) > 1 else 0.0,
        "frac_reward_zero_std": objective.degenerate_fraction(returns, ones, group),
    }
    for i, name in enumerate(rewards.names):
        column = rewards.values[:, i]
        column = column[~torch.isnan(column)]
        if len(column):
            metrics[f"rewards/{name}/mean"] = float(column.mean())
            metrics[f"rewards/{name}/std"] = float(column.std()) if len(column) > 1 else 0.0
    return {**metrics, **groups.metrics(), **rewards.metrics}

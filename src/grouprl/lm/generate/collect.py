"""Collecting a generation: draw prompts, sample groups, call the reward functions, estimate advantages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grouprl import objective
from grouprl.lm.generate.estimate import estimate_advantages, groups_with_signal
from grouprl.lm.generate.samples import Samples
from grouprl.lm.policy.log_probs import MicroBatch
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt, PromptOrder, PromptSource
from grouprl.lm.rewards.call import RewardCaller, Rewards, total
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.streams import Draws, Stream, draws_of
from grouprl.lm.settings.config import GRPOConfig
from grouprl.machine.ranks import ALONE, Place, Ranks
from grouprl.objective.user_functions import TensorFunction

Metrics = dict[str, float]


def kl_values(logp: Tensor, logp_ref: Tensor, estimator: str) -> Tensor:
    """``[S]``, nats: the estimate k1, k2 or k3 of KL(policy || reference) at each token, without a gradient path.

    Args:
        logp, logp_ref: ``[S]`` under the policy and under the reference. estimator: "k1", "k2" or "k3".
    """
    value = objective.DIVERGENCES[estimator].value
    assert value is not None
    return value(logp, logp_ref)


class Collector:
    """Turns prompts into samples to learn from.

    Args:
        policy: samples the completions. tokenizer: decodes them. rewards: scores them.
        source, order: the prompts, and the order in which to draw them.
        stream: the random stream of the sampler. own: a user's advantage function, in the place of the settings'.
        ranks: the processes that share the prompts out among them. Each has all samples afterwards.
    """

    def __init__(
        self, policy: Policy, tokenizer: Any, source: PromptSource, order: PromptOrder, rewards: RewardCaller,
        config: GRPOConfig, stream: Stream, own: TensorFunction | None = None,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.own, self.ranks = own, ranks
        self.policy, self.tokenizer, self.rewards, self.config = policy, tokenizer, rewards, config
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
        samples = self._to_samples(groups)
        metrics = {**describe(samples, groups.rewards), **_logged(rounds)}
        if self.config.beta > 0 and self.config.kl_in == "reward":
            metrics["kl"] = float(kl_values(samples.logp_old, samples.logp_ref, self.config.kl_estimator).mean())
        if self.config.dynamic_sampling:
            metrics["dynamic_sampling/batches"] = len(rounds)
        metrics["num_tokens"] = float(self.tokens)
        return samples, metrics

    def _draw(self, n_prompts: int, group_size: int, state: Any) -> ScoredGroups:
        prompts = [self.source[i] for i in self.order.next_rows(n_prompts)]
        drawn = sample_and_score(
            self.policy, self.tokenizer, self.rewards, prompts, group_size, self.stream, None, state,
            skip_special_tokens=self.config.skip_special_tokens, ranks=self.ranks,
        )  # fmt: skip
        self.tokens += sum(len(c.ids) for c in drawn.completions) + group_size * sum(len(p.ids) for p in prompts)
        return drawn

    def _to_samples(self, groups: ScoredGroups) -> Samples:
        config = self.config
        completions = [c.ids for c in groups.completions]
        lengths = torch.tensor([len(c) for c in completions])
        group = torch.arange(groups.n_prompts).repeat_interleave(groups.group_size)
        returns = groups.returns
        if config.soft_overlong_cache is not None:
            returns = returns + objective.soft_overlong(
                lengths, config.max_completion_length, config.soft_overlong_cache
            ).to(returns)
        n = int(lengths.sum())
        logp_old, logp_ref, known = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        penalties = None
        if self.policy.reference is not None and config.kl_in == "reward":
            batches = self._own_micro_batches(groups, completions, group)
            logp_old = self.policy.log_probs.without_gradient(batches, lengths)
            logp_ref = self.policy.reference.log_probs(batches, lengths)
            self.ranks.add(logp_old, logp_ref)  # each is 0 where another process has it
            known = ~known
            penalties = -objective.kl_in_reward(
                torch.zeros_like(logp_old), logp_old, logp_ref, config.beta, config.kl_estimator
            )
        advantages = estimate_advantages(
            config, groups.rewards.values, self.rewards.weights, returns, lengths, group, penalties, self.own
        )
        return Samples(
            prompts=groups.prompts, group=group, completions=completions,
            finished=torch.tensor([c.finished for c in groups.completions]),
            logp_sampled=torch.cat([c.logp for c in groups.completions]), texts=groups.texts,
            rewards=groups.rewards.values, returns=returns, advantages=advantages,
            logp_old=logp_old, logp_ref=logp_ref, known_old=known, known_ref=known.clone(),
            extras=groups.rewards.extras,
        )  # fmt: skip

    def _own_micro_batches(
        self, groups: ScoredGroups, completions: Sequence[Sequence[int]], group: Tensor
    ) -> list[MicroBatch]:
        """Micro-batches of the completions that this process evaluates: of all, if it is alone."""
        prompts = [p.ids for p in groups.prompts]
        if self.ranks.world == 1:
            return self.policy.log_probs.micro_batches(prompts, completions, group.tolist())
        own = self.policy.share([len(c) for c in completions], group.tolist())
        of_own = self.policy.log_probs.micro_batches(prompts, [completions[i] for i in own], group[own].tolist())
        return [MicroBatch(batch.groups, torch.tensor(own)[batch.samples]) for batch in of_own]


class ScoredGroups:
    """P groups of completions with their rewards, prompt after prompt: N = P * group_size completions in all."""

    def __init__(
        self, prompts: list[Prompt], group_size: int, completions: list[Completion], texts: list[str], rewards: Rewards,
        weights: Tensor,
    ) -> None:  # fmt: skip
        self.prompts, self.group_size, self.completions = prompts, group_size, completions
        self.texts, self.rewards, self.weights = texts, rewards, weights

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
        signal = groups_with_signal(config, self.rewards.values, self.weights, self.group_size, own).tolist()
        return tuple(self._select([i for i, has in enumerate(signal) if has is wanted]) for wanted in (True, False))  # type: ignore[return-value]

    def first(self, n: int) -> ScoredGroups:
        """The first n groups."""
        return self._select(list(range(n)))

    def _select(self, groups: Sequence[int]) -> ScoredGroups:
        rows = [g * self.group_size + i for g in groups for i in range(self.group_size)]
        r = self.rewards
        extras = {name: [column[i] for i in rows] for name, column in r.extras.items()}
        return ScoredGroups(
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
        return ScoredGroups(
            self.prompts + other.prompts, self.group_size, self.completions + other.completions,
            self.texts + other.texts, rewards, self.weights,
        )  # fmt: skip


def _logged(rounds: list[Rewards]) -> Metrics:
    """Metrics that reward functions logged with ``log_metric``: means over all completions they scored."""
    means: Metrics = {}
    for name in {name for rewards in rounds for name in rewards.metrics}:
        logged = [(r.metrics[name], len(r.values)) for r in rounds if name in r.metrics]
        means[name] = sum(value * n for value, n in logged) / sum(n for _, n in logged)
    return means


def sample_and_score(
    policy: Policy, tokenizer: Any, rewards: RewardCaller, prompts: list[Prompt], group_size: int,
    stream: Stream | Draws, settings: SamplingSettings | None = None, state: Any = None, *,
    skip_special_tokens: bool = False, ranks: Ranks = ALONE,
) -> ScoredGroups:  # fmt: skip
    """Sample ``group_size`` completions of each prompt and call the reward functions.

    Args:
        stream: where the random numbers come from.
        settings: how to sample; default: as the policy's configuration says.
        state: the trainer's state, handed to reward functions.
        skip_special_tokens: leave all special tokens out of the texts, and not only those that end or fill.
        ranks: the processes that share the prompts out among them. Each gets the groups of all.

    Raises UsageError or TrainingError if a reward function fails or returns something else than numbers.
    """
    draws, own = draws_of(stream, len(prompts) * group_size), ranks.share(len(prompts))
    found: tuple[list[Completion], list[str], Rewards] | None = None
    if own:
        here = [prompts[i] for i in own]
        of_own = draws.of(slice(own.start * group_size, own.stop * group_size))
        completions = policy.sample([p.ids for p in here], group_size, of_own, settings)
        texts = _texts(completions, tokenizer, skip_special_tokens)
        rows = [p for p in here for _ in range(group_size)]
        found = completions, texts, rewards(rows, texts, [c.ids for c in completions], state)
    parts = [part for part in ranks.gather(found) if part is not None]
    places = [Ranks(Place(rank, ranks.world)).share(len(prompts)) for rank in range(ranks.world)]
    groups = [
        ScoredGroups([prompts[i] for i in place], group_size, *part, rewards.weights)
        for place, part in zip([place for place in places if place], parts, strict=True)
    ]
    if len(groups) == 1:
        return groups[0]
    whole = functools.reduce(ScoredGroups.concatenate, groups)
    whole.rewards = replace(whole.rewards, metrics=_logged([part.rewards for part in groups]))
    return whole


def _texts(completions: Sequence[Completion], tokenizer: Any, skip_special_tokens: bool) -> list[str]:
    """What the model wrote, without the token that ended it and without padding."""
    padding = getattr(tokenizer, "pad_token_id", None)
    ids = [[t for t in (c.ids[:-1] if c.finished else c.ids) if t != padding] for c in completions]
    return list(tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens))


def describe_scored(batches: Sequence[ScoredGroups]) -> Metrics:
    """TRL's metrics of completions that nothing is learned from: those of an evaluation, in several batches."""
    drawn = functools.reduce(ScoredGroups.concatenate, batches)
    lengths = torch.tensor([len(c.ids) for c in drawn.completions])
    finished = torch.tensor([c.finished for c in drawn.completions])
    logged = _logged([batch.rewards for batch in batches])
    return {**_describe(lengths, finished, drawn.returns, drawn.n_prompts, drawn.rewards), **logged}


def evaluation_metrics(functions: Sequence[str]) -> list[str]:
    """The names in what `describe_scored` gives, beside those that the reward ``functions`` log themselves."""
    lengths = [f"completions/{which}_{what}" for which in ("mean", "min", "max") for what in _LENGTHS]
    of_each = [f"rewards/{name}/{what}" for name in functions for what in ("mean", "std")]
    return ["reward", "reward_std", "frac_reward_zero_std", "completions/clipped_ratio", *lengths, *of_each]


_LENGTHS = ("length", "terminated_length")


def describe(samples: Samples, rewards: Rewards) -> Metrics:
    """TRL's metrics of the samples of a generation."""
    return _describe(samples.lengths, samples.finished, samples.returns, len(samples.prompts), rewards)


def _describe(lengths: Tensor, finished: Tensor, returns: Tensor, n_groups: int, rewards: Rewards) -> Metrics:
    ones, groups = torch.ones_like(lengths), torch.arange(n_groups).repeat_interleave(len(lengths) // n_groups)
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
        "frac_reward_zero_std": objective.degenerate_fraction(returns, ones, groups),
    }
    for i, name in enumerate(rewards.names):
        column = rewards.values[:, i]
        column = column[~torch.isnan(column)]
        if len(column):
            metrics[f"rewards/{name}/mean"] = float(column.mean())
            metrics[f"rewards/{name}/std"] = float(column.std()) if len(column) > 1 else 0.0
    return {**metrics, **rewards.metrics}

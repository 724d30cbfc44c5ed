"""Making a generation: draw prompts, sample groups, ask the reward functions, estimate advantages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grouprl import objective
from grouprl.lm.generate.estimate import estimate_advantages, groups_with_signal
from grouprl.lm.generate.samples import Samples
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt, PromptOrder, PromptSource
from grouprl.lm.rewards.call import RewardCaller, Rewards, total
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective.user_functions import TensorFunction

Metrics = dict[str, float]


def estimate(logp: Tensor, logp_ref: Tensor, estimator: str) -> Tensor:
    """``[S]`` a sampled estimate of KL(policy || reference), as a value."""
    value = objective.DIVERGENCES[estimator].value
    assert value is not None
    return value(logp, logp_ref)


class Collector:
    """Turns prompts into samples to learn from.

    Args:
        policy: samples. tokenizer: decodes. source, order: where prompts come from. rewards: judges.
        generator: the random stream of the sampler. own: a user's estimator, in the place of the settings'.
    """

    def __init__(
        self, policy: Policy, tokenizer: Any, source: PromptSource, order: PromptOrder, rewards: RewardCaller,
        config: GRPOConfig, generator: torch.Generator, own: TensorFunction | None = None,
    ) -> None:  # fmt: skip
        self.own = own
        self.policy, self.tokenizer, self.rewards, self.config = policy, tokenizer, rewards, config
        self.source, self.order, self.generator = source, order, generator
        self.tokens = 0
        """Prompt and completion tokens so far, prompts counted once per completion."""

    def collect(self, n_prompts: int, group_size: int, state: Any = None) -> tuple[Samples, Metrics]:
        """A generation of ``n_prompts`` groups and its metrics."""
        drawn = self._draw(n_prompts, group_size, state)
        rounds = [drawn.rewards]
        if self.config.dynamic_sampling:
            kept, idle = drawn.parted(self.config, self.own)
            while kept.n_prompts < n_prompts and len(rounds) < self.config.dynamic_sampling_max_batches:
                more = self._draw(n_prompts - kept.n_prompts, group_size, state)
                rounds.append(more.rewards)
                further, idler = more.parted(self.config, self.own)
                kept, idle = kept.joined(further), idle.joined(idler)
            # Capped: groups without signal fill up, so that a step is never smaller than asked for.
            drawn = kept.joined(idle).first(n_prompts)
        samples = self._estimate(drawn)
        metrics = {**describe(samples, drawn.rewards), **_logged(rounds)}
        if self.config.beta > 0 and self.config.kl_in == "reward":
            metrics["kl"] = float(estimate(samples.logp_old, samples.logp_ref, self.config.kl_estimator).mean())
        if self.config.dynamic_sampling:
            metrics["dynamic_sampling/batches"] = len(rounds)
        metrics["num_tokens"] = float(self.tokens)
        return samples, metrics

    def _draw(self, n_prompts: int, group_size: int, state: Any) -> Drawn:
        prompts = [self.source[i] for i in self.order.take(n_prompts)]
        drawn = judged(self.policy, self.tokenizer, self.rewards, prompts, group_size, self.generator, None, state)
        self.tokens += sum(len(c.ids) for c in drawn.completions) + group_size * sum(len(p.ids) for p in prompts)
        return drawn

    def _estimate(self, drawn: Drawn) -> Samples:
        config = self.config
        completions = [c.ids for c in drawn.completions]
        lengths = torch.tensor([len(c) for c in completions])
        group = torch.arange(drawn.n_prompts).repeat_interleave(drawn.group_size)
        returns = drawn.returns
        if config.soft_overlong_cache is not None:
            returns = returns + objective.soft_overlong(
                lengths, config.max_completion_length, config.soft_overlong_cache
            ).to(returns)
        n = int(lengths.sum())
        old, ref, known = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        penalties = None
        if self.policy.reference is not None and config.kl_in == "reward":
            parts = self.policy.learner.parts([p.ids for p in drawn.prompts], completions, group.tolist())
            old = self.policy.learner.log_probs(parts, lengths)
            ref = self.policy.reference.log_probs(parts, lengths)
            known = ~known
            penalties = -objective.kl_in_reward(torch.zeros_like(old), old, ref, config.beta, config.kl_estimator)
        advantages = estimate_advantages(
            config, drawn.rewards.values, self.rewards.weights, returns, lengths, group, penalties, self.own
        )
        return Samples(
            prompts=drawn.prompts, group=group, completions=completions,
            finished=torch.tensor([c.finished for c in drawn.completions]),
            logp_sampled=torch.cat([c.logp for c in drawn.completions]), texts=drawn.texts,
            rewards=drawn.rewards.values, returns=returns, advantages=advantages,
            logp_old=old, logp_ref=ref, known_old=known, known_ref=known.clone(), extras=drawn.rewards.extras,
        )  # fmt: skip


class Drawn:
    """Whole groups with their rewards, prompt after prompt."""

    def __init__(
        self, prompts: list[Prompt], group_size: int, completions: list[Completion], texts: list[str], rewards: Rewards,
        weights: Tensor,
    ) -> None:  # fmt: skip
        self.prompts, self.group_size, self.completions = prompts, group_size, completions
        self.texts, self.rewards, self.weights = texts, rewards, weights

    @property
    def n_prompts(self) -> int:
        return len(self.prompts)

    @property
    def returns(self) -> Tensor:
        """``[N]`` weighted sums of the rewards."""
        return total(self.rewards.values, self.weights)

    def parted(self, config: GRPOConfig, own: TensorFunction | None) -> tuple[Drawn, Drawn]:
        """The groups whose rewards give their samples advantages, and the other ones."""
        signal = groups_with_signal(config, self.rewards.values, self.weights, self.group_size, own).tolist()
        return tuple(self._select([i for i, has in enumerate(signal) if has is kind]) for kind in (True, False))  # type: ignore[return-value]

    def first(self, n: int) -> Drawn:
        """The first n groups."""
        return self._select(list(range(n)))

    def _select(self, groups: Sequence[int]) -> Drawn:
        rows = [g * self.group_size + i for g in groups for i in range(self.group_size)]
        r = self.rewards
        extras = {name: [column[i] for i in rows] for name, column in r.extras.items()}
        return Drawn(
            [self.prompts[g] for g in groups], self.group_size, [self.completions[i] for i in rows],
            [self.texts[i] for i in rows], Rewards(r.values[rows], r.names, extras, r.metrics), self.weights,
        )  # fmt: skip

    def joined(self, other: Drawn) -> Drawn:
        """The groups of both."""
        a, b = self.rewards, other.rewards
        extras = {
            name: [*a.extras.get(name, [None] * len(a.values)), *b.extras.get(name, [None] * len(b.values))]
            for name in {**a.extras, **b.extras}
        }
        rewards = Rewards(torch.cat([a.values, b.values]), a.names, extras)
        return Drawn(
            self.prompts + other.prompts, self.group_size, self.completions + other.completions,
            self.texts + other.texts, rewards, self.weights,
        )  # fmt: skip


def _logged(rounds: list[Rewards]) -> Metrics:
    """What reward functions logged themselves, averaged over all completions they were asked about."""
    means: Metrics = {}
    for name in {name for rewards in rounds for name in rewards.metrics}:
        said = [(r.metrics[name], len(r.values)) for r in rounds if name in r.metrics]
        means[name] = sum(value * n for value, n in said) / sum(n for _, n in said)
    return means


def judged(
    policy: Policy, tokenizer: Any, rewards: RewardCaller, prompts: list[Prompt], group_size: int,
    generator: torch.Generator, settings: SamplingSettings | None = None, state: Any = None,
) -> Drawn:  # fmt: skip
    """Sample ``group_size`` completions of each prompt and ask the reward functions."""
    completions = policy.sample([p.ids for p in prompts], group_size, generator, settings)
    texts = tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
    rows = [p for p in prompts for _ in range(group_size)]
    values = rewards(rows, texts, [c.ids for c in completions], state)
    return Drawn(prompts, group_size, completions, texts, values, rewards.weights)


def describe_judged(parts: Sequence[Drawn]) -> Metrics:
    """TRL's metrics of completions that are not learned from."""
    drawn = functools.reduce(Drawn.joined, parts)
    lengths = torch.tensor([len(c.ids) for c in drawn.completions])
    finished = torch.tensor([c.finished for c in drawn.completions])
    logged = _logged([part.rewards for part in parts])
    return {**_describe(lengths, finished, drawn.returns, drawn.n_prompts, drawn.rewards), **logged}


def describe(samples: Samples, rewards: Rewards) -> Metrics:
    """TRL's metrics of sampled completions."""
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

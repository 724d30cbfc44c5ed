"""Groups of completions or episodes with their rewards, and the metrics of them in TRL's names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grouprl import objective
from grouprl.lm.generate.estimate import groups_with_signal
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards.call import Rewards, total
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective.user_functions import TensorFunction

Metrics = dict[str, float]


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

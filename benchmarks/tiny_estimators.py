"""Estimators on the preset `tiny`, and one that is noisier on purpose: which of them do five seeds tell apart?

    grouprl bench benchmarks/tiny_estimators.yaml --out runs/tiny-estimators
    python benchmarks/tiny_estimators.py runs/tiny-estimators

The second line prints, for each pair, how often the first has the larger area under its curve of greedy accuracy, and
whether the interval of the difference leaves zero out. Seeds are compared one by one: the runs of a seed begin with
the same model and the same prompts.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grouprl.bench.results import of_rows
from grouprl.bench.rows import read_rows
from grouprl.objective.groups import group_returns, per_step

SOLVED = 0.9


def one_other(rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
    """[S]: A_i = R_i - R_j, where j is the next sample of the group.

    The baseline is one sample in the place of the mean of all others. So the gradient is that of `leave_one_out` on
    average, and its baseline has G - 1 times the variance.
    """
    g = group_returns(rewards, lengths, group)
    advantages = torch.zeros_like(g.returns)
    for name in group.unique():
        own = (group == name).nonzero().flatten()
        advantages[own] = g.returns[own] - g.returns[own.roll(-1)]
    return per_step(advantages, lengths, rewards.dtype)


def steps_to(curve: list[tuple[float, float]], accuracy: float) -> float:
    """The step at which a curve first reaches an accuracy, between its points in a line; NaN if it never does."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if high >= accuracy:
            return before + (after - before) * max(0.0, accuracy - low) / (high - low)
    return float("nan")


def interval_of_mean(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean by Student's t: a bootstrap of five numbers is too narrow."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def main(folder: Path) -> None:
    (by_setting,) = of_rows(read_rows(folder / "rows.jsonl")).runs.values()
    print("| estimator | area under the curve | range | steps to .9 | after 50 steps | at the end |")
    print("|---|---|---|---|---|---|")
    areas = {}
    for name, runs in by_setting.items():
        areas[name] = {run.seed: run.values["curve_mean"] for run in runs}
        own = np.array(list(areas[name].values()))
        reached = np.array([steps_to(list(run.curve), SOLVED) for run in runs])
        half = np.mean([dict(run.curve)[50.0] for run in runs])
        end = np.mean([run.values["greedy"] for run in runs])
        print(
            f"| {name} | {own.mean():.3f} | {own.min():.3f} to {own.max():.3f} | {np.nanmean(reached):.0f} "
            f"({np.isfinite(reached).sum()} of {len(reached)} runs) | {half:.3f} | {end:.3f} |"
        )
    print("\n| pair | difference of areas, same seeds [95 %] | larger with | told apart |\n|---|---|---|---|")
    for one, other in itertools.combinations(areas, 2):
        seeds = sorted(areas[one].keys() & areas[other].keys())
        gain = np.array([areas[one][seed] - areas[other][seed] for seed in seeds])
        low, high = interval_of_mean(gain)
        apart = "yes" if low > 0 or high < 0 else "no"
        wins = f"{(gain > 0).sum()} of {len(seeds)}"
        print(f"| {one} less {other} | {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}] | {wins} | {apart} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

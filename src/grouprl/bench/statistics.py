"""Statistics of few runs, as Agarwal et al. recommend (2021, arXiv:2108.13264): computed with SciPy.

A *stratum* is the scores of one method on one subject, an array whose last axis is the runs. The bootstrap draws runs
within each stratum, so that every resample has the same subjects and numbers of runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
FEW_SEEDS = 5
"""Below this a bootstrap interval is hardly more than the range of the runs."""


def iqm(*strata: Array) -> Array:
    """The interquartile mean over the last axis of all strata together: ``[..., n_i] -> [...]``.

    A quarter of the values, rounded down, is left out at each end. Strata weigh the same, whatever their numbers of
    runs: each run counts as often as makes them equally long.
    """
    from scipy.stats import trim_mean

    longest = math.lcm(*(stratum.shape[-1] for stratum in strata))
    pooled = np.concatenate([np.repeat(s, longest // s.shape[-1], axis=-1) for s in strata], axis=-1)
    mean: Array = trim_mean(pooled, 0.25, axis=-1)
    return mean


def improvement(ours: Sequence[Array], others: Sequence[Array]) -> Array:
    """The probability that a run of ours scores more than one of the others', ties counted half, mean over subjects.

    Args:
        ours, others: a stratum for each subject, in the same order; ``[..., n_i]`` and ``[..., m_i]``.
    """
    shares = []
    for a, b in zip(ours, others, strict=True):
        first, second = a[..., :, None], b[..., None, :]
        shares.append(((first > second) + 0.5 * (first == second)).mean((-2, -1)))
    mean: Array = np.mean(shares, axis=0)
    return mean


def difference(ours: Sequence[Array], others: Sequence[Array]) -> Array:
    """The IQM of ours less that of the others."""
    return iqm(*ours) - iqm(*others)


def mean_difference(ours: Sequence[Array], others: Sequence[Array]) -> Array:
    """The difference of the IQMs on each subject, mean over subjects.

    :func:`difference` leaves out the lowest quarter of all runs, and with it a subject on which all runs of ours fail;
    here each subject counts.

    Args:
        ours, others: a stratum for each subject, in the same order.
    """
    mean: Array = np.mean([iqm(a) - iqm(b) for a, b in zip(ours, others, strict=True)], axis=0)
    return mean


Interval = tuple[Any, Any]
"""Lower and upper bound: numbers, or arrays of the strata's leading axes."""


def interval(statistic: Callable[..., Array], *groups: Sequence[Array], resamples: int = RESAMPLES) -> Interval | None:
    """The 95 % interval of a statistic by the stratified percentile bootstrap; None if a stratum has one run only.

    Args:
        statistic: of one group of strata, as :func:`iqm`, each an argument; or of two groups, each a sequence, as
            :func:`difference`.
        groups: one or two groups of strata.
    """
    from scipy.stats import bootstrap

    strata = [stratum for group in groups for stratum in group]
    if min(stratum.shape[-1] for stratum in strata) < 2:
        return None

    def of(*drawn: Array, axis: int = -1) -> Array:
        moved = [np.moveaxis(one, axis, -1) for one in drawn]
        if len(groups) == 1:
            return statistic(*moved)
        return statistic(moved[: len(groups[0])], moved[len(groups[0]) :])

    found = bootstrap(
        strata, of, n_resamples=resamples, batch=min(resamples, 500), vectorized=True, axis=-1, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found.low, found.high


def on_grid(curve: Sequence[tuple[float, float]], grid: Array) -> Array:
    """A curve read off at the points of a grid, straight between its own; before the first and after the last as there.

    A curve is (step, value) pairs; the result is as long as the grid.
    """
    ordered = sorted(curve)
    return np.interp(grid, [x for x, _ in ordered], [y for _, y in ordered])


def area_mean(curve: Sequence[tuple[float, float]]) -> float:
    """The mean of a curve over its steps, straight between its points: where there are many points weighs no more."""
    x, y = np.array(sorted(curve), dtype=np.float64).T
    between = np.diff(x) * (y[1:] + y[:-1]) / 2
    return float(between.sum() / (x[-1] - x[0])) if x[-1] > x[0] else float(y.mean())


def common_grid(curves: Sequence[Sequence[tuple[float, float]]], points: int = 50) -> Array:
    """Steps that all curves cover, evenly spaced. Empty if they have none in common."""
    first = max(min(x for x, _ in curve) for curve in curves)
    last = min(max(x for x, _ in curve) for curve in curves)
    return np.linspace(first, last, points) if first <= last else np.empty(0)

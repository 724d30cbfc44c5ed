"""Figures of runs: sample efficiency, scores with their intervals, performance profiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grouprl.bench.plan import Scale
from grouprl.bench.results import Result, Results
from grouprl.bench.statistics import Array, common_grid, interval, iqm, on_grid
from grouprl.bench.tables import normalised
from grouprl.runs.plots import COLOURS, dressed, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes"], None]

_BAND_RESAMPLES = 1000
_PROFILE_POINTS = 60
_FEW_EVALUATIONS = 12
"""Curves of fewer evaluations have a mark at each, so that nobody takes the lines between them for measured."""
_FEW, _DPI, _DPI_OF_MANY = 6, 150, 100


def curves(results: Results, scales: Mapping[str, Scale], out: Path, order: Sequence[str] = ()) -> None:
    """Sample efficiency: the IQM of greedy evaluations over steps, a panel for each subject, and one for all of them.

    The panel of all has normalised scores over the share of the steps that were trained, if two subjects or more have a
    scale. It shows the settings that have runs of all of these subjects. ``order`` has settings whose colours come
    first, whether there are runs of them or not: so the colours of several figures are the same.
    """
    colours = _ordered(results, order)
    subjects = [subject for subject in results.runs if _curves_of(results, subject)]
    together = [subject for subject in subjects if subject in scales]
    panels: list[Panel] = [partial(_efficiency, results=results, subject=s, colours=colours) for s in subjects]
    if len(together) > 1:
        panels.append(partial(_overall, results=results, subjects=together, scales=scales, colours=colours))
    if panels:
        _figure(panels, results.settings, colours, out)


def seconds(results: Results, out: Path, order: Sequence[str] = ()) -> None:
    """Wall clock: the IQM of greedy evaluations over CPU seconds of training, a panel for each subject.

    The first evaluation, before any training, has no place on the logarithmic axis. ``order`` as in :func:`curves`.
    """
    colours = _ordered(results, order)
    subjects = [subject for subject in results.runs if _timed(results, subject)]
    panels: list[Panel] = [partial(_over_seconds, results=results, subject=s, colours=colours) for s in subjects]
    if panels:
        _figure(panels, results.settings, colours, out)


def scores(
    results: Results, metric: str, scales: Mapping[str, Scale], out: Path, order: Sequence[str] = ()
) -> None:  # fmt: skip
    """Each setting's IQM with its interval, and the share of runs that score more than any level.

    ``order`` as in :func:`curves`.
    """
    colours = _ordered(results, order)
    scaled = {setting: normalised(results, metric, scales, setting) for setting in results.settings}
    if len({subject for by in scaled.values() for subject in by}) > 1:
        groups = {f"normalised {_label(metric)}": {setting: list(by.values()) for setting, by in scaled.items() if by}}
    else:
        groups = {f"{_label(metric)}, {subject}": _scores_of(results, subject, metric) for subject in results.runs}
    panels: list[Panel] = [
        partial(draw, strata=strata, name=name, colours=colours)
        for name, strata in groups.items()
        for draw in (_intervals, _profile)
        if strata
    ]
    _figure(panels, results.settings, colours, out)


def both(results: Results, metric: str, out: Path) -> None:
    """One figure of one subject: sample efficiency on the left, scores with intervals on the right."""
    (subject,) = results.runs
    own = _scores_of(results, subject, metric)
    panels: list[Panel] = [partial(_intervals, strata=own, name=_label(metric), colours=results.settings)]
    if _curves_of(results, subject):
        panels.insert(0, partial(_efficiency, results=results, subject=subject, colours=results.settings))
    _figure(panels, results.settings, results.settings, out)


def _label(metric: str) -> str:
    """What a metric is called on an axis."""
    return f"{metric} return" if metric in ("greedy", "sampled") else metric


def _scores_of(results: Results, subject: str, metric: str) -> dict[str, list[Array]]:
    """One stratum for each setting that has scores."""
    found = {setting: results.scores(subject, setting, metric) for setting in results.runs[subject]}
    return {setting: [scores] for setting, scores in found.items() if len(scores)}


def _ordered(results: Results, order: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((*order, *results.settings)))


def _figure(panels: Sequence[Panel], settings: list[str], colours: list[str], out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(len(panels), 4 if len(panels) > 6 else 3 if len(panels) > 4 else 2)
    rows = -(-len(panels) // columns)
    legend = -(-len(settings) // 3)
    tall = max(3.3, 0.2 * len(settings) + 1.0)  # room for a line of text each
    figure = Figure(
        figsize=(max(4.4 * columns, 5.0), tall * rows + 0.25 * legend),
        dpi=_DPI if len(panels) <= _FEW else _DPI_OF_MANY,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    for number, draw in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw(axes)
        dressed(axes)
    lines = [Line2D([], [], color=_colour(s, colours), linestyle=_style(s, colours), linewidth=1.8) for s in settings]
    figure.legend(lines, list(map(_plain, settings)), fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    save(figure, out)


def _plain(name: str) -> str:
    """A name as it is: between two $ matplotlib would read mathematics."""
    return name.replace("$", r"\$")


def _colour(setting: str, colours: list[str]) -> str:
    return COLOURS[colours.index(setting) % len(COLOURS)]


def _style(setting: str, colours: list[str]) -> Any:
    return ("-", "--", ":", "-.")[colours.index(setting) // len(COLOURS) % 4]


def _curves_of(results: Results, subject: str) -> dict[str, list[Result]]:
    found = {setting: [run for run in runs if run.curve] for setting, runs in results.runs[subject].items()}
    return {setting: runs for setting, runs in found.items() if runs}


def _line(axes: Axes, grid: Array, strata: list[Array], evaluated: Array, setting: str, colours: list[str]) -> None:
    """The IQM of strata ``[points, runs]`` over a grid, with its 95 % interval as a band, and marks on the line."""
    colour, middle = _colour(setting, colours), iqm(*strata)
    axes.plot(grid, middle, color=colour, linestyle=_style(setting, colours), linewidth=1.8)
    axes.plot(evaluated, np.interp(evaluated, grid, middle), "o", color=colour, markersize=3.5)
    band = interval(iqm, strata, resamples=_BAND_RESAMPLES)
    if band is not None:
        axes.fill_between(grid, *band, color=colour, alpha=0.15, linewidth=0)


def _evaluated(curves: Sequence[Sequence[tuple[float, float]]], grid: Array) -> Array:
    """Where within a grid the runs were evaluated, if that is not often."""
    few = max(map(len, curves)) < _FEW_EVALUATIONS
    return np.array(sorted({x for curve in curves for x, _ in curve if few and grid[0] <= x <= grid[-1]}))


def _efficiency(axes: Axes, results: Results, subject: str, colours: list[str]) -> None:
    from matplotlib.ticker import EngFormatter

    for setting, runs in _curves_of(results, subject).items():
        evaluations = [run.curve for run in runs]
        grid = common_grid(evaluations)
        if len(grid):
            values = np.stack([on_grid(curve, grid) for curve in evaluations], axis=-1)
            _line(axes, grid, [values], _evaluated(evaluations, grid), setting, colours)
    axes.set_title(_plain(subject), fontsize=10)
    axes.set_xlabel("steps")
    axes.set_ylabel("greedy return, IQM")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _timed(results: Results, subject: str) -> dict[str, list[list[tuple[float, float]]]]:
    """Curves of a subject over the logarithm of CPU seconds, by setting, of those whose runs measured them."""
    found = {
        setting: [_over_clock(run) for run in runs if run.clock]
        for setting, runs in _curves_of(results, subject).items()
    }
    return {setting: curves for setting, curves in found.items() if curves and all(map(len, curves))}


def _over_clock(run: Result) -> list[tuple[float, float]]:
    spent = on_grid(run.clock, np.array([step for step, _ in run.curve]))
    return [(math.log10(at), value) for at, (_, value) in zip(spent, run.curve, strict=True) if at > 0]


def _over_seconds(axes: Axes, results: Results, subject: str, colours: list[str]) -> None:
    from matplotlib.ticker import NullFormatter

    for setting, timed in _timed(results, subject).items():
        grid = common_grid(timed)
        if len(grid):
            values = np.stack([on_grid(curve, grid) for curve in timed], axis=-1)
            _line(axes, 10**grid, [values], 10 ** _evaluated(timed, grid), setting, colours)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # labels between powers of ten run into each other
    axes.set_title(_plain(subject), fontsize=10)
    axes.set_xlabel("CPU seconds of training")
    axes.set_ylabel("greedy return, IQM")


def _over_shares(run: Result) -> list[tuple[float, float]]:
    """The curve of a run over the share of the steps that it was trained for."""
    return [(step / (run.trained or run.steps), value) for step, value in run.curve]


def _overall(
    axes: Axes, results: Results, subjects: list[str], scales: Mapping[str, Scale], colours: list[str]
) -> None:  # fmt: skip
    shares = np.linspace(0.05, 1, 20)
    for setting in results.settings:
        strata, evaluations = [], []
        for subject in subjects:
            low, high = scales[subject]
            runs = _curves_of(results, subject).get(setting, [])
            if runs:
                own = [_over_shares(run) for run in runs]
                values = np.stack([on_grid(curve, shares) for curve in own], axis=-1)
                strata.append((values - low) / (high - low))
                evaluations += own
        if len(strata) == len(subjects):
            _line(axes, shares, strata, _evaluated(evaluations, shares), setting, colours)
    axes.set_title(f"all {len(subjects)}, normalised", fontsize=10)
    axes.set_xlabel("share of the steps")
    axes.set_ylabel("normalised greedy return, IQM")


def _intervals(axes: Axes, strata: Mapping[str, list[Array]], name: str, colours: list[str]) -> None:
    for place, (setting, own) in enumerate(strata.items()):
        colour = _colour(setting, colours)
        found = interval(iqm, own)
        if found is not None:
            axes.plot(found, [place, place], color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt")
        axes.plot([float(iqm(*own))], [place], "|", color=colour, markersize=14, markeredgewidth=2.5)
    axes.set_yticks(range(len(strata)), list(map(_plain, strata)), fontsize=8)
    axes.set_ylim(len(strata) - 0.5, -0.5)
    axes.set_xlabel(f"{_plain(name)}: IQM, 95 % interval")


def _profile(axes: Axes, strata: Mapping[str, list[Array]], name: str, colours: list[str]) -> None:
    every = np.concatenate([stratum for own in strata.values() for stratum in own])
    levels = np.linspace(every.min(), every.max(), _PROFILE_POINTS)
    for setting, own in strata.items():
        above = [(stratum[None, :] > levels[:, None]).astype(float) for stratum in own]

        def share(*drawn: Array) -> Array:
            mean: Array = np.mean([one.mean(-1) for one in drawn], axis=0)
            return mean

        colour = _colour(setting, colours)
        axes.step(levels, share(*above), where="post", color=colour, linestyle=_style(setting, colours), linewidth=1.8)
        band = interval(share, above, resamples=_BAND_RESAMPLES)
        if band is not None:
            axes.fill_between(levels, *band, step="post", color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(f"level of {_plain(name)}")
    axes.set_ylabel("share of runs above it")

"""Learning curves."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grouprl.errors import UsageError
from grouprl.runs.files import atomic_path
from grouprl.runs.folder import RunFolder
from grouprl.runs.metrics import read_metrics
from grouprl.runs.wording import wording

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_GRID_POINTS = 200
_BOOTSTRAP_SAMPLES = 1000
_AXIS_NAMES = {
    "step": "Steps",
    "update": "Updates",
    "return_mean": "Return",
    "train_seconds": "Training time (s)",
    "eval_return": "Return in evaluation",
    "reward": "Reward",
    "eval_accuracy": "{Success} on {held_out}, greedy",
}
# Colours that people with colour blindness can tell apart (Okabe and Ito, 2008), the darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_EVALUATION_OF = {"return_mean": "eval_return", "reward": "eval_reward"}
"""What is shown beside a curve as dots: the same quantity, in evaluations."""
_MEANING = {
    "return_mean": ("line: training, sampled actions, mean of recent episodes", "dot: evaluation, greedy actions"),
    "reward": ("line: training, sampled completions", "dot: evaluation on {held_out}"),
}
"""What the legend says of line and dots."""
_FEWEST_FOR_AN_INTERVAL = 5
"""With fewer runs a bootstrap interval is hardly more than their range, so the range is shown."""
_NOT_LEARNED_FROM = ("grouprl", "run.")
"""Beginnings of keys that change nothing of what is learned; a label names them only where nothing else differs."""
_EVALUATION_STYLE: dict[str, Any] = {"markeredgecolor": "white", "markersize": 5.5}


@dataclass(frozen=True)
class _Run:
    config: dict[str, Any]
    curve: tuple[Array, Array]  # x and y, each [rows with both]
    evaluation: tuple[Array, Array]


def plot_run(folder: RunFolder, *, y: str = "return_mean", threshold: float | None = None) -> Path:
    """Draw the learning curve of one run into its folder and return the path. Raises as `plot_runs` does."""
    plot_runs([folder.path], folder.curve_path, y=y, threshold=threshold)
    return folder.curve_path


def plot_runs(
    run_paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    x: str = "step",
    y: str = "return_mean",
    threshold: float | None = None,
) -> list[str]:
    """Draw the learning curves of runs into the picture `out`, one line per configuration.

    Runs whose configurations differ only in the seed share a line: their mean, with a 95 % bootstrap interval of the
    mean (their range where they are fewer than five), over the steps that all of them reached. Of runs that have the
    same seed too the longest counts. A lone run is shown as it is, faintly, under its moving average. Evaluations of
    the same quantity (columns eval_return, eval_reward), where there are any, are dots. `threshold` is a dashed line.

    Returns notes: which runs were left out, and why.

    Raises UsageError if a run has no rows, or lacks the columns `x` or `y`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not run_paths:
        raise UsageError("No runs to plot. Give at least one run folder.")
    runs = [_load(RunFolder.open(path), x, y) for path in run_paths]
    words = wording(runs[0].config)
    groups, notes = _without_repetitions(_group(runs))
    names = labels([group[0].config for group in groups])

    figure = Figure(figsize=(7.0, 4.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (group, label) in enumerate(zip(groups, names, strict=True)):
        _draw(axes, group, label, COLOURS[number % len(COLOURS)], show_evaluation=y in _EVALUATION_OF)
    if threshold is not None:
        axes.axhline(threshold, color="0.35", linestyle="--", linewidth=1, label=f"threshold {threshold:g}", zorder=1)
    if y in _EVALUATION_OF and any(len(run.evaluation[0]) for run in runs):
        line, dot = (words(text) for text in _MEANING[y])
        axes.plot([], [], color="0.5", linewidth=1.8, label=line)
        axes.plot([], [], "o", color="0.5", **_EVALUATION_STYLE, label=dot)
    _dress(axes, runs, x, words(_AXIS_NAMES[y]) if y in _AXIS_NAMES else y)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    save(figure, out)
    return notes


def save(figure: Figure, out: str | os.PathLike[str]) -> None:
    """Write a picture. Raises UsageError if its format is unknown or it cannot be written."""
    with atomic_path(out) as temporary:
        try:
            figure.savefig(temporary)
        except ValueError as error:
            raise UsageError(f"Cannot write the picture {out}: {error}") from error


def _load(folder: RunFolder, x: str, y: str) -> _Run:
    import numpy as np

    metrics = read_metrics(folder.metrics_path)
    if not metrics or not len(next(iter(metrics.values()))):
        raise UsageError(f"{folder.path} has no metrics yet: there is nothing to plot.")
    for column in (x, y):
        if column not in metrics:
            raise UsageError(f"{folder.metrics_path} has no column {column!r}. Choose from: {', '.join(metrics)}.")

    def points(column: str) -> tuple[Array, Array]:
        values = metrics.get(column, np.full_like(metrics[x], np.nan))
        present = np.isfinite(metrics[x]) & np.isfinite(values)
        return metrics[x][present], values[present]

    curve = points(y)
    if not len(curve[0]):
        raise UsageError(f"{folder.path} has no value of {y!r} yet: there is nothing to plot.")
    return _Run(folder.read_config(), curve, points(_EVALUATION_OF.get(y, "")))


_SEEDS = ("seed", "config.seed", "recipe.config.seed")
"""Where a configuration has the seed of its run; an environment's arguments may have a seed of their own."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"config": {"lr": 1}} -> {"config.lr": 1}, without the seed of the run."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" in _SEEDS:
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _group(runs: Sequence[_Run]) -> list[list[_Run]]:
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        identity = json.dumps(flatten(run.config), sort_keys=True, default=str)
        groups.setdefault(identity, []).append(run)
    return list(groups.values())


def _without_repetitions(groups: Sequence[Sequence[_Run]]) -> tuple[list[list[_Run]], list[str]]:
    """Of runs of one configuration and one seed the longest, and a note on each seed that was there several times."""
    kept, notes = [], []
    for group in groups:
        by_seed: dict[str, list[_Run]] = {}
        for run in group:
            by_seed.setdefault(str(run.config.get("seed")), []).append(run)
        notes += [
            f"{len(same)} runs have the same configuration and seed {seed}; the longest is shown"
            for seed, same in by_seed.items()
            if len(same) > 1
        ]
        kept.append([max(same, key=lambda run: run.curve[0][-1]) for same in by_seed.values()])
    return kept, notes


def labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each configuration the settings that tell it from others with the same env_id, and the env_id if it must.

    A label names three settings at most. Those that would be the same are numbered.
    """
    flat = [flatten(config) for config in configs]
    found = []
    for own in flat:
        rivals = [other for other in flat if subject_of(other) == subject_of(own)]
        keys = [key for key in own if any(rival.get(key) != own[key] for rival in rivals)]
        keys = [key for key in keys if not key.startswith(_NOT_LEARNED_FROM)] or keys
        if "preset" in keys and all(rival is own or rival.get("preset") != own["preset"] for rival in rivals):
            keys = ["preset"]  # which says all the rest
        named = {key.rsplit(".", 1)[-1]: own[key] for key in keys}
        if "preset" in named and named["preset"] is None:
            named["preset"] = "default"  # as the command line calls it
        settings = [f"{name}={value}" for name, value in named.items()]
        settings = settings[:3] + (["..."] if len(settings) > 3 else [])
        subject = [str(subject_of(own))] if subject_of(own) and (not settings or len(rivals) < len(flat)) else []
        found.append(", ".join([*subject, *settings]) or "run")
    return _numbered(found)


def _numbered(names: Sequence[str]) -> list[str]:
    """Names of which no two are the same: "a", "a" -> "a", "a (2)"."""
    found: list[str] = []
    for name in names:
        again = (f"{name} ({number})" for number in itertools.count(2))
        found.append(name if name not in found else next(one for one in again if one not in (*found, *names)))
    return found


def subject_of(config: Mapping[str, Any]) -> Any:
    """What was learned: an environment, or a task."""
    return config.get("env_id") or config.get("task")


def _draw(axes: Axes, group: Sequence[_Run], label: str, colour: str, *, show_evaluation: bool) -> None:
    import numpy as np

    if len(group) == 1:
        xs, ys = group[0].curve
        window = max(1, len(ys) // 20)
        if window > 1:
            axes.plot(xs, ys, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(xs, _moving_average(ys, window), color=colour, linewidth=1.8, label=f"{label} (smoothed)")
        else:
            axes.plot(xs, ys, color=colour, linewidth=1.8, label=label, marker="o" if len(xs) == 1 else None)
    else:
        xs, values = _common_grid([run.curve for run in group])
        few = len(group) < _FEWEST_FOR_AN_INTERVAL
        low, high = (values.min(0), values.max(0)) if few else _bootstrap(values)
        band = "range" if few else "95 % interval"
        axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(xs, values.mean(0), color=colour, linewidth=1.8, label=f"{label}: mean of {len(group)}, {band}")
    if show_evaluation:
        eval_x = np.concatenate([run.evaluation[0] for run in group])
        eval_y = np.concatenate([run.evaluation[1] for run in group])
        points = [point for point in np.unique(eval_x) if point <= xs[-1]]
        means = [eval_y[eval_x == point].mean() for point in points]
        axes.plot(points, means, "o", color=colour, **_EVALUATION_STYLE, zorder=3)


def _moving_average(values: Array, window: int) -> Array:
    """Centred mean over `window` values, over fewer at the ends. [n] -> [n]"""
    import numpy as np

    kernel = np.ones(window)
    total = np.convolve(values, kernel, mode="same")
    count = np.convolve(np.ones_like(values), kernel, mode="same")
    averages: Array = total / count
    return averages


def _common_grid(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Curves read off at the same points: (x [P], y [runs, P]), between what all of them cover."""
    import numpy as np

    start = max(xs.min() for xs, _ in curves)
    stop = min(xs.max() for xs, _ in curves)
    if start > stop:
        raise UsageError("Runs of one configuration have no steps in common; plot them one by one.")
    grid = np.linspace(start, stop, _GRID_POINTS if stop > start else 1)
    rows = []
    for xs, ys in curves:
        order = np.argsort(xs, kind="stable")
        rows.append(np.interp(grid, xs[order], ys[order]))
    return grid, np.stack(rows)


def _bootstrap(values: Array) -> tuple[Array, Array]:
    """Bounds of the 95 % percentile bootstrap interval of the mean over runs: [runs, P] -> [P], [P]."""
    import numpy as np

    runs = values.shape[0]
    picks = np.random.default_rng(0).integers(runs, size=(_BOOTSTRAP_SAMPLES, runs))
    weights = np.stack([(picks == run).mean(1) for run in range(runs)], axis=1)  # [samples, runs]
    low, high = np.percentile(weights @ values, [2.5, 97.5], axis=0)
    return low, high


def _dress(axes: Axes, runs: Sequence[_Run], x: str, y_name: str) -> None:
    from matplotlib.ticker import EngFormatter

    subjects = {subject_of(run.config) for run in runs}
    x_name = _AXIS_NAMES.get(x, x)
    if x == "step":
        arenas = {"env_id" in run.config for run in runs}
        x_name = {True: "Environment steps", False: "Optimizer steps"}[arenas.pop()] if len(arenas) == 1 else x_name
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    if x == "step":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(subjects) == 1 and None not in subjects:
        (subject,), presets = subjects, {run.config.get("preset") for run in runs}
        preset = f", preset {presets.pop()}" if len(presets) == 1 and not presets & {subject, None} else ""
        axes.set_title(f"{subject}{preset}", fontsize=11)
    dressed(axes)


def dressed(axes: Axes) -> None:
    """A light grid behind the curves, and no frame above and to the right of them."""
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

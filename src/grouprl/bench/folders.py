"""Runs that exist, as folders, for tables: those of `train` and `train-lm`, and benchmarks' own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grouprl.bench.results import Result, Results, of_rows
from grouprl.bench.rows import read_rows
from grouprl.errors import UsageError
from grouprl.runs import RunFolder, read_metrics
from grouprl.runs.files import read_bytes, user_path
from grouprl.runs.plots import flatten, labels, subject_of

_GREEDY = {False: ("eval_return", "return_mean"), True: ("eval_accuracy", "reward")}
"""Columns of greedy evaluations, and of what was sampled in training, for environments and for language models."""


def of_folders(paths: Sequence[str | os.PathLike[str]]) -> Results:
    """The runs in folders. Runs whose configurations differ only in the seed are one setting.

    A folder of a benchmark or a sweep counts as all of its runs that are done.

    Raises UsageError if a folder holds no run, or its files cannot be read.
    """
    rows: list[dict[str, Any]] = []
    configs: dict[str, dict[str, Any]] = {}
    runs: list[tuple[str, RunFolder]] = []
    for path in dict.fromkeys(Path(os.path.realpath(user_path(path))) for path in paths):
        if (path / "rows.jsonl").is_file():
            rows += {row["id"]: row for row in read_rows(path / "rows.jsonl")}.values()  # of each run the last
            continue
        folder = RunFolder.open(path)
        config = folder.read_config()
        identity = json.dumps(flatten(config), sort_keys=True, default=str)
        configs.setdefault(identity, config)
        runs.append((identity, folder))
    names = dict(zip(configs, labels(list(configs.values())), strict=True))
    benchmarks = of_rows(rows)
    given = [run for settings in benchmarks.runs.values() for of_one in settings.values() for run in of_one]
    given += [_result(folder, names[identity]) for identity, folder in runs]
    results = Results.of(given)
    results.failed = benchmarks.failed
    results.notes += benchmarks.notes
    results.notes += [f"{folder.path} is not finished" for _, folder in runs if not folder.is_finished()]
    return results


def _result(folder: RunFolder, setting: str) -> Result:
    config, metrics = folder.read_config(), read_metrics(folder.metrics_path)
    language = config.get("arena") == "lm"
    values = {}
    for name, column in metrics.items():
        known = column[np.isfinite(column)]
        if len(known):
            values[name] = float(known[-1])
    values |= _of_summary(folder)
    greedy, _ = _GREEDY[language]
    points = zip(metrics.get("step", ()), metrics.get(greedy, ()), strict=False)
    curve = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    steps = config.get("config", {}).get("max_steps") if language else config.get("run", {}).get("total_timesteps")
    return Result(
        setting, str(subject_of(config)), int(config.get("seed", 0)), values, curve, int(steps or 0),
        trained=values.get("step", 0.0),
    )  # fmt: skip


def _of_summary(folder: RunFolder) -> dict[str, float]:
    """The end of a finished run: greedy, and the numbers of its summary."""
    if not folder.is_finished():
        return {}
    try:
        summary = json.loads(read_bytes(folder.summary_path, "summary of a run"))
        numbers = {k: float(v) for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        greedy = summary["eval"]["mean_return"] if "eval" in summary else summary["accuracy_after"]
        return {**numbers, "greedy": float(greedy)}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{folder.summary_path} is not the summary of a run") from None

"""What tables and figures are made of: the runs of a benchmark, of a sweep, or of folders, in one form."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import numpy as np

from grouprl.bench.cells import ENVIRONMENTS, Cell
from grouprl.bench.rows import Row
from grouprl.bench.statistics import Array, area_mean
from grouprl.errors import UsageError

RETURNS = ("greedy", "sampled", "curve_mean")
"""Metrics that are returns: more is better, and the scale of a subject is of them."""
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")
_NAMED = 10
"""Methods on subjects that a note of failures names."""
_ENOUGH = 0.75
"""The share of the points asked for that a curve must have."""
_MEASURED = ("train_seconds", "train_cpu_seconds", "seconds", "cpu_seconds", "peak_memory_mb")


@dataclass(frozen=True)
class Result:
    """A run that ended.

    Attributes:
        setting: what was tried, a line of the table. subject: what it was tried on. seed: of the run.
        values: what it reached, by the name of the metric. curve: (step, value) of greedy evaluations.
        steps: its budget. clock: (step, CPU seconds of training until then), where they were measured.
        processor: on which it ran, "" where that is not known; seconds of two do not compare.
        trained: steps that it was trained for, 0 where that is not known.
        experiment: all that decides its outcome but the seed, as text: what differs there is no seed of the same.
    """

    setting: str
    subject: str
    seed: int
    values: Mapping[str, float]
    curve: Sequence[tuple[float, float]] = ()
    steps: int = 0
    clock: Sequence[tuple[float, float]] = ()
    processor: str = ""
    experiment: str = ""
    trained: float = 0


@dataclass
class Results:
    """Runs by subject and setting, each seed once, in the order in which they were given.

    Attributes:
        runs: subject -> setting -> runs, by seed. notes: what was left out.
        failed: how many runs of (subject, setting) failed.
    """

    runs: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)

    @classmethod
    def of(cls, given: Iterable[Result]) -> Results:
        """Sort runs; of two with the same seed, the longer one counts, of two equally long ones the last.

        Where several experiments have one name, the one with the longest run counts, of equally long ones the last.
        """
        given = list(given)
        longest: dict[tuple[str, str], Result] = {}
        for one in given:
            name = (one.setting, one.subject)
            if name not in longest or one.steps >= longest[name].steps:
                longest[name] = one
        left_out: Counter[tuple[str, str]] = Counter()
        found: dict[str, dict[str, dict[int, Result]]] = {}
        twice: dict[str, None] = {}
        for one in given:
            if one.experiment != longest[one.setting, one.subject].experiment:
                left_out[one.setting, one.subject] += 1
                continue
            seeds = found.setdefault(one.subject, {}).setdefault(one.setting, {})
            if one.seed in seeds:
                twice[f"{one.setting} on {one.subject} has seed {one.seed} several times; it counts once"] = None
                if one.steps < seeds[one.seed].steps:
                    continue
            seeds[one.seed] = one
        runs = {
            subject: {setting: [seeds[s] for s in sorted(seeds)] for setting, seeds in settings.items()}
            for subject, settings in found.items()
        }
        others = [
            f"{n} runs called {setting} on {subject} had other settings, steps or code than the rest, and are left "
            "out; give them another name to see both"
            for (setting, subject), n in left_out.items()
        ]
        return cls(runs, [*others, *twice])

    @property
    def settings(self) -> list[str]:
        """All of them, in order."""
        return list(dict.fromkeys(setting for settings in self.runs.values() for setting in settings))

    def first(self, n: int) -> Results:
        """The runs of the first ``n`` settings."""
        return self.only(self.settings[:n], self.runs)

    def only(self, settings: Collection[str], subjects: Collection[str]) -> Results:
        """The runs of these settings on these subjects."""
        return Results(
            {s: {k: v for k, v in by.items() if k in settings} for s, by in self.runs.items() if s in subjects},
            self.notes,
            self.failed,
        )

    def scores(self, subject: str, setting: str, metric: str) -> Array:
        """``[runs]``: the metric of each run that has it."""
        values = [run.values.get(metric, math.nan) for run in self.runs[subject].get(setting, [])]
        return np.array([value for value in values if math.isfinite(value)], dtype=np.float64)

    def check_metric(self, metric: str) -> None:
        """Raises UsageError if no run has it, with those that there are."""
        known = sorted(
            {name for by in self.runs.values() for runs in by.values() for run in runs for name in run.values}
        )
        _check_metric(metric, known)


def _check_metric(metric: str, known: Sequence[str]) -> None:
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"no run has the metric {metric!r}; {hint}there are: {', '.join(known) or 'none'}")


def check_metric_of_rows(metric: str) -> None:
    """Raises UsageError if no row can have it, before there are any."""
    _check_metric(metric, sorted((*RETURNS, *_MEASURED)))


def of_rows(rows: Iterable[Row]) -> Results:
    """The runs that are done among rows; those that failed, and warnings of the others, become notes."""
    done, lost = [], Counter[tuple[str, str]]()
    failed: dict[str, list[Row]] = {}
    warned: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["status"] == "done":
            done.append(_of_row(row))
            for said in (*(row.get("warnings") or ()), *_few_points(row)):
                alike = (row["method"], row["subject"], _NUMBER.sub("", said))
                warned.setdefault(alike, []).append(f"{row['method']} on {row['subject']}: {said}")
        else:
            failed.setdefault(_NUMBER.sub("", str(row.get("error"))), []).append(row)
            lost[row["subject"], row["method"]] += 1
    results = Results.of(done)
    results.failed = lost
    results.notes += [*map(_of_failed, failed.values()), *(_of_several(notes) for notes in warned.values())]
    return results


def _of_failed(rows: Sequence[Row]) -> str:
    """Runs that failed with errors that differ in their numbers at most: which they are, and the first one's error."""
    seeds: dict[str, list[str]] = {}
    for row in rows:
        seeds.setdefault(f"{row['method']}/{row['subject']}", []).append(str(row["seed"]))
    named = [f"{name}/{','.join(those)}" for name, those in seeds.items()]
    more = [f"{len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return f"{'; '.join([*named[:_NAMED], *more])} failed: {rows[0].get('error')}"


def experiment_of(row: Row) -> str:
    """What decides the outcome of a row's run, but the seed; what an older row does not name has its default."""
    parts = [part for part in fields(Cell) if part.name not in ("seed", "folder")]
    decides = {part.name: row[part.name] if part.name in row else _default(part) for part in parts}
    return json.dumps(decides, sort_keys=True, default=str)


def _default(part: Field[Any]) -> object:
    if part.default_factory is not MISSING:
        return part.default_factory()
    return None if part.default is MISSING else part.default


def _of_several(notes: Sequence[str]) -> str:
    """The first of notes that differ in their numbers at most, as those of several seeds do, and of how many more."""
    return f"{notes[0]} ({len(notes) - 1} more like it)" if len(set(notes)) > 1 else notes[0]


def _few_points(row: Row) -> list[str]:
    """A sentence if the curve of a run has clearly fewer points than were asked for."""
    asked, found = row.get("points", 0), sum(point["step"] > 0 for point in row.get("curve", ()))
    if row["arena"] != ENVIRONMENTS or not row.get("curve") or found >= _ENOUGH * asked:
        return []
    return [f"{found} of {asked} points of the curve: a batch holds more steps than lie between them"]


def _of_row(row: Row) -> Result:
    values: dict[str, Any] = {name: row.get(name) for name in _MEASURED}
    values |= {name: row[name]["mean"] for name in RETURNS if isinstance(row.get(name), dict)}
    curve = [
        (float(point["step"]), float(point["greedy"]))
        for point in row.get("curve", [])
        if point.get("greedy") is not None
    ]
    end = float(row.get("steps_done") or row["steps"])
    if not curve or curve[-1][0] < end:
        curve.append((end, float(values["greedy"])))
    values["curve_mean"] = area_mean(curve)
    known = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    processor = str((row.get("machine") or {}).get("processor", ""))
    clock = _clock(row, end)
    return Result(
        row["method"], row["subject"], row["seed"], known, curve, row["steps"], clock, processor, experiment_of(row),
        trained=end,
    )  # fmt: skip


def _clock(row: Row, end: float) -> list[tuple[float, float]]:
    """CPU seconds at the points of the curve, from 0 at the first step to those of the whole training at the last."""
    if row.get("train_cpu_seconds") is None:
        return []
    points = [(float(p["step"]), p.get("cpu_seconds")) for p in row.get("curve", ())]
    between = [(step, float(spent)) for step, spent in points if spent is not None and 0 < step < end]
    return [(0.0, 0.0), *between, (end, float(row["train_cpu_seconds"]))]

"""A benchmark from its file to rows, and from the rows to tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from grouprl.bench import figures, pool, tables
from grouprl.bench.cells import Cell
from grouprl.bench.plan import Plan, Scale, does
from grouprl.bench.results import RETURNS, Results, check_metric_of_rows, of_rows
from grouprl.bench.rows import Row, Rows, other_code, read_rows
from grouprl.bench.sweep import Sweep, Swept
from grouprl.errors import UsageError, shown
from grouprl.extras import require
from grouprl.runs.files import write_text

Say = Callable[[str], None]

_DRAWN = 7
"""Settings in the figure of a sweep: more colours cannot be told apart."""


def run(plan: Plan, out: Path, *, jobs: int, again: bool = False, say: Say = print) -> int:
    """Do the runs of a plan that the folder ``out`` has no row of; returns how many failed.

    Args:
        jobs: how many at once, each on a core of its own while there are enough. again: those that failed too.

    Raises UsageError if another process works in the folder, or it cannot be written.
    """
    failed = 0
    with Rows.held(out) as rows:
        known = [cell for cell in plan.cells if cell.id in rows.by_id]
        broken = [cell for cell in known if rows.by_id[cell.id]["status"] != "done"]
        todo = [cell for cell in plan.cells if cell not in known or (again and cell in broken)]
        say(f"{len(plan.cells)} runs, {len(known) - len(broken)} done before, {len(todo)} to do; rows: {rows.path}")
        if broken and not again:
            say(f"note: {len(broken)} runs failed before and stay so; --again tries them again")
        if others := other_code(rows.by_id[cell.id] for cell in known):
            say(others)
        total, ended = len(todo), 0
        what = {cell.id: does(cell) for cell in plan.cells}
        same: dict[str, list[Cell]] = {}
        for cell in todo:
            same.setdefault(what[cell.id], []).append(cell)

        def note(cell: Cell, row: Row) -> None:
            nonlocal failed, ended
            ended += 1
            failed += row["status"] != "done"
            twin = f", the same run as {row['same_as']}" if "same_as" in row else ""
            say(f"[{ended}/{total}] {cell.name}: {_came_of(row)}{twin}")

        def done(cell: Cell, outcome: pool.Outcome) -> None:
            row = rows.append(cell, outcome, jobs)
            note(cell, row)
            for other in same.pop(what[cell.id])[1:]:
                note(other, rows.append_same(other, row))

        for cell in known:
            if cell not in broken:
                for other in same.pop(what[cell.id], []):
                    note(other, rows.append_same(other, rows.by_id[cell.id]))
        first = iter([cells[0] for cells in same.values()])
        pool.run(lambda: next(first, None), done, jobs=jobs)
    return failed


def _came_of(outcome: pool.Outcome) -> str:
    if outcome["status"] != "done":
        return f"FAILED: {outcome['error']}"
    sampled = f", sampled {tables.number(outcome['sampled']['mean'])}" if outcome.get("sampled") else ""
    return f"greedy {tables.number(outcome['greedy']['mean'])}{sampled}, {outcome['seconds']:.1f} s"


def rows_of(plan: Plan, rows: Iterable[Row]) -> list[Row]:
    """The last row of each run of the plan, in the plan's order of methods and subjects."""
    by_id = {row["id"]: row for row in rows}
    methods = list(dict.fromkeys(cell.method for cell in plan.cells))
    subjects = list(dict.fromkeys(cell.subject for cell in plan.cells))
    found = [(cell, by_id[cell.id]) for cell in plan.cells if cell.id in by_id]
    found.sort(key=lambda pair: (subjects.index(pair[0].subject), methods.index(pair[0].method), pair[0].seed))
    return [row for _, row in found]


def rows_in(plan: Plan, out: Path) -> list[Row]:
    """Those of a plan that ``out`` has, for :func:`report`.

    Raises UsageError if it has rows of other runs only, DamagedFileError if its file holds something else.
    """
    rows = read_rows(out / "rows.jsonl")
    found = rows_of(plan, rows)
    if rows and not found:
        raise UsageError(
            f"none of the {len(rows)} rows in {out} is of these runs: steps, seeds, settings or code were others; give "
            "the options that they were made with"
        )
    return found


def report(
    rows: list[Row], out: Path, title: str, *, scales: Mapping[str, Scale] | None = None, metric: str = "greedy",
    reference: str | None = None, about: str = "", missing: int = 0, prefix: str = "",
) -> str:  # fmt: skip
    """Write table.md, curves.png and scores.png into ``out``, and return the text.

    Args:
        scales: of subjects, for scores over all of them where the metric is a return. metric: what the table is of.
        reference: the method that the others are compared with; default: the first that has a run. Where none of its
            runs is done, nothing is compared. missing: runs that have no row yet. prefix: of the files' names.

    Raises UsageError if there is no run that is done, or no run has the metric.
    """
    results = of_rows(rows)
    _check_some(results)
    of_metric = (scales or {}) if metric in RETURNS else {}
    text = _text(results, title, about, metric, reference, of_metric)
    notes = tables.warnings(results) + ([f"{missing} runs are still to be done"] if missing else [])
    text += _noted([*notes, *_not_compared(results, tables.reference_of(results, reference))])
    curves, scores = f"{prefix}curves.png", f"{prefix}scores.png"
    figures.curves(results, scales or {}, out / curves)
    figures.scores(results, metric, of_metric, out / scores)
    text += f"\n![Greedy evaluations over steps]({curves})\n\n![Scores]({scores})\n\n{made_of(rows)}"
    write_text(out / f"{prefix}table.md", text)
    return text


def _noted(notes: Iterable[str]) -> str:
    return "".join(f"\nNote: {note.rstrip('.')}.\n" for note in notes)


def _not_compared(results: Results, against: str) -> list[str]:
    """A sentence if the method that others are compared with has no run that is done on some subjects."""
    without = [subject for subject, by in results.runs.items() if against not in by]
    return [f"no run of {against} on {', '.join(without)} is done, so nothing is compared there"] if without else []


def _text(
    results: Results, title: str, about: str, metric: str, reference: str | None, scales: Mapping[str, Scale]
) -> str:
    require("scipy")
    against = tables.reference_of(results, reference)
    text = f"# {title}\n\n" + (f"{about}\n\n" if about else "") + tables.method(metric, against) + "\n\n"
    text += tables.table(results, metric, reference)
    shared = [subject for subject in results.runs if subject in scales]
    if len(shared) > 1:
        ends = "; ".join(f"{s} {tables.number(scales[s][0])} to {tables.number(scales[s][1])}" for s in shared)
        text += f"\n## All {len(shared)} together\n\nNormalised scores: 0 to 1 is {ends}.\n\n"
        text += tables.overall(results, metric, scales, reference)
        for setting in results.settings:
            missing = [subject for subject in shared if setting not in results.runs[subject]]
            if missing:
                text += f"\nNote: {setting} has no run on {', '.join(missing)}; its score over all does not compare.\n"
    return text


def report_sweep(sweep: Sweep, found: Swept, out: Path) -> str:
    """Write table.md and sweep.png of a sweep into ``out``, and return the text: settings by rank, the best first.

    Raises UsageError if no trial has ended well.
    """
    results = of_rows(found.rows)
    if not results.runs:
        failed = f"; the first that failed: {results.notes[0]}" if results.notes else ""
        raise UsageError(f"no trial has ended{failed}")
    text = f"# Sweep of {sweep.cell.subject}\n\n{table_text(results, sweep.metric, None)}"
    if found.pruned:
        text += f"\nPruned: {'; '.join(found.pruned)}.\n"
    figures.both(results.first(_DRAWN), sweep.metric, out / "sweep.png")
    text += f"\n![The best settings over steps, and their scores](sweep.png)\n\n{made_of(found.rows)}"
    write_text(out / "table.md", text)
    return text


def _check_some(results: Results) -> None:
    """Raises UsageError if no run is done."""
    if not results.runs:
        failed = f"; the first that failed: {results.notes[0]}" if results.notes else ""
        raise UsageError(f"no run is done yet{failed}")


def table_text(results: Results, metric: str, reference: str | None) -> str:
    """A table of runs, how to read it, and what keeps it from saying what it seems to say.

    Raises UsageError if no run is done or has the metric, or none is of the reference.
    """
    _check_some(results)
    _check_reference(results.settings, reference)
    text = tables.method(metric, tables.reference_of(results, reference)) + "\n\n"
    text += tables.table(results, metric, reference)
    return text + _noted(tables.warnings(results))


def draw(results: Results, metric: str, out: Path) -> None:
    """A figure of runs: sample efficiency and scores of the one subject, or scores alone of several."""
    if len(results.runs) == 1:
        figures.both(results, metric, out)
    else:
        figures.scores(results, metric, {}, out)


def check_report(plan: Plan, metric: str, reference: str | None) -> None:
    """Raises UsageError before a run begins for what :func:`report` would refuse after the last."""
    check_metric_of_rows(metric)
    _check_reference(list(dict.fromkeys(cell.method for cell in plan.cells)), reference)


def _check_reference(known: list[str], reference: str | None) -> None:
    """Raises UsageError if ``reference`` is not among the settings."""
    if reference is not None and reference not in known:
        raise UsageError(f"reference={shown(reference)} has no run; there are {', '.join(known)}")


def made_of(rows: list[Row]) -> str:
    """The versions, machines and commits that rows were measured with: a line of text."""
    versions = sorted({f"{name} {v}" for row in rows for name, v in (row.get("versions") or {}).items()})
    machines = sorted(
        {f"{row['machine']['processor']}, cores: {row['machine']['cores']}" for row in rows if "machine" in row}
    )
    commits = sorted({str(row["commit"]) for row in rows if row.get("commit")})
    parts = [", ".join(versions), "; ".join(machines), *([f"commit {', '.join(commits)}"] if commits else [])]
    return ". ".join(part for part in parts if part) + ".\n"

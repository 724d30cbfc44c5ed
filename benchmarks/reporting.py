"""What the reports of benchmarks share: a file's runs, the rows that are there, and words for a difference."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grouprl.bench import harness, plan
from grouprl.bench.plan import Plan
from grouprl.bench.results import Results, of_rows
from grouprl.bench.rows import Row, read_rows
from grouprl.bench.statistics import Array, difference, interval

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
IMAGES = HERE.parent / "docs" / "images"

ENOUGH = 3
"""Seeds that either side needs before a difference gets a word."""

NAMED = 10
"""More methods than these, of which as many runs are done, are counted and not named."""

Groups = dict[tuple[str, str], list[Row]]
"""Runs that are done, by subject and method, in the order of the plan."""


@dataclass(frozen=True)
class Benchmark:
    """A file, and what it has so far.

    Attributes:
        plan: the runs that the file asks for. rows: of those that ended, in the plan's order.
        pictures: the folder of pictures. page: the report.
    """

    plan: Plan
    rows: list[Row]
    pictures: Path = IMAGES
    page: Path = RESULTS / "page.md"

    @classmethod
    def read(cls, file: Path, folder: Path, steps: int | None = None) -> Benchmark:
        """That of a file with the rows in a folder. Pictures of a trial, in a folder elsewhere, stay in its folder."""
        planned = plan.read(file, steps=steps)
        rows = harness.rows_of(planned, read_rows(folder / "rows.jsonl"))
        return cls(planned, rows, IMAGES if folder.parent == RESULTS else folder, folder.with_name(f"{folder.name}.md"))

    @property
    def groups(self) -> Groups:
        """Runs that are done."""
        found: Groups = {}
        for row in self.rows:
            if row["status"] == "done":
                found.setdefault((row["subject"], row["method"]), []).append(row)
        return found

    @property
    def methods(self) -> list[str]:
        """All that the file has, with runs or without."""
        return list(dict.fromkeys(cell.method for cell in self.plan.cells))

    @property
    def results(self) -> Results:
        """Runs that are done, for tables and figures."""
        return of_rows(self.rows)

    def picture(self, name: str, draw: Callable[[Path], None], says: str) -> str:
        """Draw a picture; returns the line that shows it on the page, with what it says."""
        path = self.pictures / name
        draw(path)
        return f"\n![{says}]({os.path.relpath(path, self.page.parent)})\n" if path.exists() else ""

    def progress(self) -> str:
        """How many runs are done, of each method too, and which ones failed: a paragraph."""
        wanted = Counter(cell.method for cell in self.plan.cells)
        done = Counter(row["method"] for row in self.rows if row["status"] == "done")
        alike: dict[tuple[int, int], list[str]] = {}
        for method, n in wanted.items():
            alike.setdefault((done[method], n), []).append(method)
        each = "; ".join(f"{_named(methods)}: {n} of {all_of_it}" for (n, all_of_it), methods in alike.items())
        failed = [f"{row['method']}/{row['subject']}/{row['seed']}" for row in self.rows if row["status"] != "done"]
        text = f"{done.total():,} of {wanted.total():,} runs are done"
        text += f". Of each method: {each}." if done.total() < wanted.total() else "."
        return text + (f" Failed: {', '.join(failed)}." if failed else "")


def _named(methods: Sequence[str]) -> str:
    return ", ".join(methods) if len(methods) <= NAMED else f"{len(methods)} others"


def verdict(ours: Sequence[Array], others: Sequence[Array], statistic: Callable[..., Array] = difference) -> str:
    """A word for the difference of two sides, each with a stratum of runs for each subject.

    "above" or "below" where the 95 % interval of the difference leaves 0 out, "level" where it does not, and "too few
    seeds" where a stratum has fewer than `ENOUGH`.
    """
    if not ours or min(len(stratum) for stratum in (*ours, *others)) < ENOUGH:
        return "too few seeds"
    found = interval(statistic, ours, others)
    assert found is not None  # every stratum has several runs
    low, high = found
    return "above" if low > 0 else "below" if high < 0 else "level"


def measure(file: Path, out: Path, *options: str) -> int:
    """Do the runs of a file that have no row yet. Returns the exit status."""
    command = [sys.executable, "-m", "grouprl", "bench", str(file.relative_to(HERE.parent)), "--out", str(out)]
    return subprocess.run([*command, *options], cwd=HERE.parent, check=False).returncode


def main(about: str, name: str, report: Callable[[Benchmark], str]) -> int:
    """The command of a benchmark of one file: NAME.yaml becomes rows in results/NAME, and they results/NAME.md."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--only", action="append", default=[], help="METHOD/SUBJECT/SEED, or its first parts")
    parser.add_argument("--seeds", help="other seeds than the file's: 0-1")
    parser.add_argument("--jobs", type=int, help="runs at once")
    parser.add_argument("--steps", type=int, help="other steps than the file's, for a trial; give --out as well")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / name, help="the folder of rows; the report goes beside it"
    )
    given = parser.parse_args()
    out, file = given.out.resolve(), HERE / f"{name}.yaml"
    if given.steps is not None and out == RESULTS / name:
        parser.error("--steps is for a trial, whose rows are no results; give --out a folder of its own")
    status = 0
    if not given.table:
        options = {"--seeds": given.seeds, "--jobs": given.jobs, "--steps": given.steps}
        named = [f"{option}={value}" for option, value in options.items() if value is not None]
        status = measure(file, out, *named, *(f"--only={pattern}" for pattern in given.only))
    found = Benchmark.read(file, out, given.steps)
    found.page.write_text(report(found), encoding="utf-8")
    print(f"{found.progress()}\nwrote {found.page}")
    return status

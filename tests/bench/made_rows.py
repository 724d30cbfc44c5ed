"""Rows of the benchmarks that ship, made up for tests of their reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grouprl.bench import plan
from grouprl.bench.cells import Cell

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # so that tests find the programs there


def line(cell: Cell, **says: Any) -> str:
    """A row of a run that is done, if it says nothing else, as a line of the file."""
    rest = {"status": "done", "machine": {"processor": "P", "cores": 2}, "curve": [], **says}
    return json.dumps({"id": cell.id, **asdict(cell), **rest}) + "\n"


def write(folder: Path, benchmark: str, returns: dict[str, Sequence[float]], **says: Any) -> None:
    """A row for each final greedy return of METHOD/SUBJECT: the first of seed 0, the second of seed 1, and so on."""
    cells = {cell.name: cell for cell in plan.read(BENCHMARKS / benchmark).cells}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("a") as file:
        for name, means in returns.items():
            for seed, mean in enumerate(means):
                file.write(
                    line(cells[f"{name}/{seed}"], greedy={"mean": mean, "episodes": 100, "returns": [mean]}, **says)
                )

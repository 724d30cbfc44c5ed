"""Tables of the chapter's claims: what counts as a collapse, and rows that become lines."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from grouprl.bench import plan

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import claims


@pytest.mark.parametrize(
    ("scores", "fell"),
    [
        ([0.0, 0.8, 0.3, 0.3, 0.3], True),
        ([0.0, 0.8, 0.3, 0.3, 0.41], False),  # it came back
        ([0.0, 0.8, 0.8, 0.3, 0.3], False),  # not for long enough
        ([0.0, 0.4, 0.1, 0.1, 0.1], False),  # it had learned nothing
        ([0.9, 0.1, 0.1], False),  # too few to say
        ([0.0, 0.6, -1.0, -1.0, -1.0], True),
    ],
)
def test_a_run_collapses_if_it_falls_below_half_of_its_best_and_stays_there(scores: list[float], fell: bool) -> None:
    assert claims.collapsed(scores) is fell


def rows(tmp_path: Path, part: str, says: dict[str, dict[str, Any]]) -> None:
    """Write a row for each of the first two seeds of each run of a part whose METHOD/SUBJECT is among ``says``."""
    (tmp_path / part).mkdir()
    lines = []
    for cell in plan.read(claims.HERE / "claims" / f"{part}.yaml").cells:
        said = says.get(f"{cell.method}/{cell.subject}")
        if said is not None and cell.seed < 2:
            rest = {"status": "done", "machine": {"processor": "P", "cores": 2}, "curve": [], **said}
            lines.append(json.dumps({"id": cell.id, **asdict(cell), **rest}) + "\n")
    assert lines
    (tmp_path / part / "rows.jsonl").write_text("".join(lines))


def test_rows_become_the_tables_of_the_report(tmp_path: Path) -> None:
    curve = [{"step": i, "greedy": value} for i, value in enumerate([24.0, 475.0, 30.0, 30.0])]
    stable = {"greedy": {"mean": 30.0}, "curve": curve, "approx_kl": [0.01, 0.02, 7.0]}
    rows(tmp_path, "stability", {"no-clip-10/CartPole-v1": stable, "clip-1/CartPole-v1": {**stable, "curve": []}})
    cost = {"train_cpu_seconds": 0.5, "train_seconds": 1.0, "steps_done": 50_000, "parameters": 1000}
    rows(tmp_path, "cost", {"sb3-ppo/CartPole-v1": {**cost, "greedy": {"mean": 1.0}, "peak_memory_mb": 300.0}})
    rows(
        tmp_path,
        "noise",
        {
            "preset-0/Acrobot-v1": {"greedy": {"mean": -80.0}},
            "preset-0.5/Acrobot-v1": {"greedy": {"mean": -95.0}},
        },
    )
    text = claims.report(tmp_path)
    assert "| CartPole-v1 | sb3-ppo | 2 | 1,000 | 16.0 | 300.0 | 10.0 | 20.0 | 0.50 |" in text
    assert "| CartPole-v1 | 0.2 | 1 | 2 | 0.02 | 7 | 7 | 30.0 | 0 | 0 |" in text
    assert "| CartPole-v1 | none | 10 | 2 | 0.02 | 7 | 7 | 30.0 | 2 | 2 |" in text
    assert "| Acrobot-v1 | preset | 2 | -80.0 (worst -80.0) | -95.0 (worst -95.0) |" in text
    assert "100,000 on Acrobot-v1. P, cores: 2." in text


def test_a_part_without_runs_has_no_section(tmp_path: Path) -> None:
    assert "##" not in claims.report(tmp_path)

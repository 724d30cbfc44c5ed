"""No rule speaks on a healthy run of a preset, neither at its end nor at any of the looks that a running run gets.

The runs are recorded; `record.py` says how.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grouprl.doctor import Table, examine_table
from grouprl.doctor.examine import examine_running
from grouprl.doctor.watch import LOOKS
from grouprl.envs import presets
from grouprl.lm.run import recipe

FOLDER = Path(__file__).parent
ABOUT: dict[str, Any] = {
    folder: yaml.safe_load((FOLDER / folder / "runs.yaml").read_text()) for folder in ("healthy", "ill")
}
RUNS: dict[str, Any] = ABOUT["healthy"]


@cache
def recorded(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open() as file:
        names, *rows = csv.reader(file)
    return names, np.array([[float(x or "nan") for x in row] for row in rows])


def table(name: str, share: float = 1.0, folder: str = "healthy") -> Table:
    about = ABOUT[folder][name]
    names, rows = recorded(FOLDER / folder / f"{name}.csv")
    values = rows[: max(1, round(len(rows) * share))]
    return Table(dict(zip(names, values.T, strict=True)), about["settings"], about["goal"], share)


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_wrong_with_a_healthy_run(name: str) -> None:
    found = examine_table(table(name), RUNS[name]["language_model"])
    assert [one.name for one in found if one.ill] == []


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_said_while_a_healthy_run_goes_on(name: str) -> None:
    for hundredth in range(1, 101):  # a running run is looked at less often
        found = examine_running(table(name, hundredth / 100), RUNS[name]["language_model"])
        assert [one.name for one in found if one.ill] == [], f"after {hundredth} %"


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_wrong_with_a_healthy_run_that_is_examined_before_its_end(name: str) -> None:
    for tenth in range(1, 10):
        found = examine_table(table(name, tenth / 10), RUNS[name]["language_model"])
        assert [one.name for one in found if one.ill] == [], f"after {10 * tenth} %"


def test_every_preset_and_every_recipe_has_a_healthy_run_and_so_has_the_robust_default() -> None:
    assert set(RUNS) == {"default", *presets.names(), *recipe.names()}


def test_a_recipe_whose_answers_became_copies_is_ill_soon_after() -> None:
    ill = table("nth-word-seed42", folder="ill")
    assert [one.name for one in examine_table(ill, language_model=True) if one.ill] == ["duplicates"]
    told = [
        look
        for look in range(1, LOOKS + 1)
        if examine_running(table("nth-word-seed42", look / LOOKS, "ill"), language_model=True)
    ]
    assert told[0] in (7, 8, 9)

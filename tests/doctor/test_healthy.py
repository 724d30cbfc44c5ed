"""No rule speaks on a healthy run of a preset, neither at its end nor at any of the looks that a running run gets.

The runs are recorded (`record.py` says how), all but those of the presets that take longest: BipedalWalker-v3,
HalfCheetah-v5, Swimmer-v5 and Walker2d-v5; and of the recipes that train SmolLM2 in an environment or with a tool.
"""

from __future__ import annotations

import csv
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
RUNS: dict[str, Any] = yaml.safe_load((FOLDER / "healthy" / "runs.yaml").read_text())


def table(name: str, share: float = 1.0, folder: str = "healthy") -> Table:
    about = yaml.safe_load((FOLDER / folder / "runs.yaml").read_text())[name]
    with (FOLDER / folder / f"{name}.csv").open() as file:
        names, *rows = csv.reader(file)
    values = np.array([[float(x or "nan") for x in row] for row in rows])[: round(len(rows) * share)]
    return Table(dict(zip(names, values.T, strict=True)), about["settings"], about["goal"])


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_wrong_with_a_healthy_run(name: str) -> None:
    found = examine_table(table(name), RUNS[name]["language_model"])
    assert [one.name for one in found if one.ill] == []


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_said_while_a_healthy_run_goes_on(name: str) -> None:
    for look in range(1, LOOKS + 1):
        found = examine_running(table(name, look / LOOKS), RUNS[name]["language_model"])
        assert [one.name for one in found if one.ill] == [], f"after {look / LOOKS:.0%}"


def test_every_recorded_run_is_that_of_a_preset_or_a_recipe_or_the_robust_default() -> None:
    assert set(RUNS) - {"default"} <= set(presets.names()) | set(recipe.names())


def test_a_recipe_whose_answers_became_copies_is_ill_soon_after() -> None:
    ill = table("nth-word-seed42", folder="ill")
    assert [one.name for one in examine_table(ill, language_model=True) if one.ill] == ["duplicates"]
    told = [
        look
        for look in range(1, LOOKS + 1)
        if examine_running(table("nth-word-seed42", look / LOOKS, "ill"), language_model=True)
    ]
    assert told[0] in (7, 8, 9)

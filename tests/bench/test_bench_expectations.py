"""What presets say of themselves comes from rows of benchmarks."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import made_rows
import pytest
import yaml
from made_rows import BENCHMARKS

import expectations
from grouprl.bench import plan
from grouprl.envs import presets


def copied(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "presets"
    folder.mkdir()
    for name in names:
        shutil.copy(expectations.PRESETS / f"{name}.yaml", folder)
    return folder


def test_rows_replace_what_a_preset_says_of_itself_and_nothing_else(tmp_path: Path) -> None:
    folder = copied(tmp_path, "Acrobot-v1", "script")
    made_rows.write(
        tmp_path / "evidence",
        "evidence.yaml",
        {
            "grouprl-preset/Acrobot-v1": [-80.0, -81.0, -82.0, -83.0, -90.0],
            "tutorial-script/CartPole-v1": [500.0, 400.006, 450.0],
            "tutorial-script/Acrobot-v1": [-500.0] * 5,  # not the environment that the preset is for
        },
    )
    assert set(expectations.update(tmp_path, folder)) == {"Acrobot-v1", "script"}
    for name, expected in (
        (
            "Acrobot-v1",
            {
                "mean_return": -83.2, "lowest_seed": -90.0, "highest_seed": -80.0, "seeds": [0, 1, 2, 3, 4],
                "steps": 200_000,
                "measured": "greedy, 100 episodes per seed; grouprl bench benchmarks/evidence.yaml --only "
                "'grouprl-preset/Acrobot-v1'",
            },
        ),
        (
            "script",
            {
                "mean_return": 450.0, "lowest_seed": 400.01, "highest_seed": 500.0, "seeds": [0, 1, 2],
                "steps": 100_000,
                "measured": "greedy, 100 episodes per seed; grouprl bench benchmarks/evidence.yaml --only "
                "'tutorial-script/CartPole-v1'",
            },
        ),
    ):  # fmt: skip
        before, after = (
            yaml.safe_load((where / f"{name}.yaml").read_text()) for where in (expectations.PRESETS, folder)
        )
        assert after.pop("expect") == expected
        before.pop("expect")
        assert after == before


def test_fewer_seeds_than_a_preset_was_measured_with_change_nothing(tmp_path: Path) -> None:
    folder = copied(tmp_path, "Acrobot-v1")
    made_rows.write(tmp_path / "evidence", "evidence.yaml", {"grouprl-preset/Acrobot-v1": [-80.0, -81.0, -82.0, -83.0]})
    assert expectations.update(tmp_path, folder) == {}
    name = "Acrobot-v1.yaml"
    assert (folder / name).read_bytes() == (expectations.PRESETS / name).read_bytes()


def test_an_environment_without_a_preset_is_none_of_their_business(tmp_path: Path) -> None:
    made_rows.write(tmp_path / "evidence", "evidence.yaml", {"grouprl-preset/FrozenLake8x8-v1": [0.5] * 10})
    assert expectations.update(tmp_path, tmp_path) == {}


@pytest.mark.parametrize("name", presets.names())
def test_the_command_that_a_preset_names_measures_it(name: str) -> None:
    command = shlex.split(presets.load(name).expect["measured"].partition("; ")[2])
    assert command[:2] == ["grouprl", "bench"]
    assert command[3] == "--only"
    chosen = plan.read(BENCHMARKS.parent / command[2]).only(command[4:]).cells
    assert {(cell.preset, bool(cell.settings)) for cell in chosen} == {(name, False)}

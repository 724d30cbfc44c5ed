"""The report of changes to the robust default: differences, their order and words, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import made_rows
from made_rows import BENCHMARKS

import ablations
from grouprl.bench import plan
from reporting import Benchmark

# Normalised: (return + 500) / 400 on Acrobot-v1, (return + 200) / 90 on MountainCar-v0.
DEFAULT = {"default/Acrobot-v1": [-100.0, -100.0, -100.0], "default/MountainCar-v0": [-110.0, -110.0, -110.0]}


def report(folder: Path, returns: dict[str, list[float]]) -> str:
    made_rows.write(folder, "ablations.yaml", {**DEFAULT, **returns})
    return ablations.report(Benchmark.read(BENCHMARKS / "ablations.yaml", folder))


def lines(text: str) -> list[str]:
    """Of the table of changes, without its header."""
    return [line for line in text.partition("## Changes")[2].splitlines() if line.startswith("| ")][2:]


def test_changes_are_beside_the_default_and_the_largest_difference_comes_first(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        {
            "epochs=4/Acrobot-v1": [-20.0, -20.0, -20.0],
            "sticky=0/MountainCar-v0": [-200.0, -200.0, -200.0],
            "reuse=3/Acrobot-v1": [-300.0, -100.0, -100.0],
        },
    )
    assert lines(text) == [
        # -90 / 90 on MountainCar-v0, and the default is alone on Acrobot-v1
        "| sticky=0 |  |  | -1.000 [-1.000, -1.000] | -1.000 [-1.000, -1.000] | 1 | 3 | below |",
        "| epochs=4 |  | +0.200 [+0.200, +0.200] |  | +0.200 [+0.200, +0.200] | 1 | 3 | above |",
        # the mean of 0.5, 1 and 1, less 1; all three may be drawn alike, so the interval ends at 0
        "| reuse=3 | minibatch_size=768 | -0.167 [-0.500, +0.000] |  | -0.167 [-0.500, +0.000] | 1 | 3 | level |",
    ]
    assert "- below: `sticky=0` (-1.00)\n- above: `epochs=4` (+0.20)\n- level: `reuse=3` (-0.17)\n\n" in text
    assert "| Acrobot-v1 | 100,000 | 3 | -100.0 [-100.0, -100.0] |" in text
    assert "\n15 of 770 runs are done. Of each method: default: 6 of 25; 26 others: 0 of 25; " in text


def test_all_is_over_the_environments_that_both_have(tmp_path: Path) -> None:
    made_rows.write(tmp_path, "ablations.yaml", {"epochs=20/Pendulum-v1": [-172.0]})
    text = report(tmp_path, {"epochs=20/Acrobot-v1": [-500.0] * 3, "epochs=20/MountainCar-v0": [-110.0] * 3})
    # the mean of -1 and 0; Pendulum-v1 has no run of the default
    each = "-1.000 [-1.000, -1.000] | +0.000 [+0.000, +0.000] | "
    assert lines(text) == [f"| epochs=20 |  | {each} | -0.500 [-0.500, -0.500] | 2 | 3 | below |"]


def test_one_seed_has_no_interval_and_no_word(tmp_path: Path) -> None:
    text = report(tmp_path, {"epsilon=0.3/Acrobot-v1": [-500.0]})
    assert lines(text) == ["| epsilon=0.3 |  | -1.000 |  | -1.000 | 1 | 1 | too few seeds |"]


def test_without_the_default_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    made_rows.write(tmp_path, "ablations.yaml", {"epsilon=0.3/Acrobot-v1": [-500.0]})
    assert lines(ablations.report(Benchmark.read(BENCHMARKS / "ablations.yaml", tmp_path))) == []


def test_each_change_is_called_after_a_setting_and_its_value() -> None:
    for cell in plan.read(BENCHMARKS / "ablations.yaml").cells:
        name, _, value = cell.method.partition("=")
        if cell.method != "default":
            given = cell.settings[name]
            assert value == str(given).lower() or float(value) == given, cell.method

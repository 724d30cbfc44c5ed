"""The report of methods beside each other: words, seconds and lines that were worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made_rows
import numpy as np
import pytest
from made_rows import BENCHMARKS

import evidence
from grouprl.bench import figures
from grouprl.bench.results import Result, Results, of_rows
from grouprl.bench.rows import read_rows
from reporting import Benchmark, verdict

PPO = [400.0, 402.0, 404.0]


def read(folder: Path) -> Benchmark:
    return Benchmark.read(BENCHMARKS / "evidence.yaml", folder)


@pytest.mark.parametrize(
    ("ours", "others", "word"),
    [
        ([10.0, 11.0, 12.0], [0.0, 1.0, 2.0], "above"),
        ([0.0, 1.0, 2.0], [10.0, 11.0, 12.0], "below"),
        ([0.0, 5.0, 10.0], [1.0, 5.0, 9.0], "level"),
        ([5.0, 5.0, 5.0], [5.0, 5.0, 5.0], "level"),
        ([10.0, 11.0], [0.0, 1.0, 2.0], "too few seeds"),
        ([10.0, 11.0, 12.0], [0.0], "too few seeds"),
        ([], [0.0, 1.0, 2.0], "too few seeds"),
    ],
)
def test_a_word_needs_three_seeds_on_both_sides_and_an_interval_without_0(
    ours: list[float], others: list[float], word: str
) -> None:
    assert verdict([np.array(ours)], [np.array(others)]) == word


def test_a_word_for_several_environments_needs_three_seeds_on_each() -> None:
    high, low = np.array([1.0, 1.1, 1.2]), np.array([0.0, 0.1, 0.2])
    assert verdict([high, high], [low, low]) == "above"
    assert verdict([high, high[:2]], [low, low]) == "too few seeds"
    assert verdict([], []) == "too few seeds"


def run(curve: list[tuple[float, float]], final: float, seconds: float, seed: int = 0) -> Result:
    """A run whose seconds grow evenly with its steps."""
    clock = [(0.0, 0.0), (curve[-1][0], seconds)]
    return Result("m", "s", seed, {"greedy": final}, curve, int(curve[-1][0]), clock)


def test_a_curve_reaches_a_target_at_the_first_point_of_the_grid_that_is_not_below_it() -> None:
    # straight from 0 at step 0 to 100 at step 1000: 45 is reached at step 450, after 45 % of 20 seconds
    rising = [run([(0.0, 0.0), (1000.0, 100.0)], 100.0, 20.0)]
    assert evidence.first_reach(rising, 45.0) == pytest.approx((9.0, 450.0))
    assert evidence.first_reach(rising, 45.5) == pytest.approx((9.2, 460.0))  # the grid has every tenth step
    assert evidence.first_reach(rising, 101.0) is None


def test_the_final_evaluation_counts_at_the_end_of_a_run() -> None:
    # the last point on the way says 90, the longer evaluation after it 50
    assert evidence.first_reach([run([(0.0, 0.0), (1000.0, 90.0)], 50.0, 20.0)], 60.0) is None


def test_seeds_are_averaged_before_a_curve_is_asked_for_a_target() -> None:
    # at step s: s / 10 and 0, so the IQM of both is s / 20, which is 30 at step 600, after 6 s and after 18 s
    runs = [
        run([(0.0, 0.0), (1000.0, 100.0)], 100.0, 10.0),
        run([(0.0, 0.0), (1000.0, 0.0)], 0.0, 30.0, seed=1),
    ]
    assert evidence.first_reach(runs, 30.0) == pytest.approx((12.0, 600.0))


def test_a_run_that_ended_sooner_stays_where_it_ended() -> None:
    runs = [run([(0.0, 0.0), (500.0, 10.0)], 10.0, 5.0), run([(0.0, 0.0), (1000.0, 10.0)], 10.0, 10.0, seed=1)]
    assert evidence.first_reach(runs, 10.0) == pytest.approx((7.5, 1000.0))


def test_a_method_keeps_its_colour_whether_others_have_runs_or_not(tmp_path: Path) -> None:
    results = Results.of([run([(0.0, 0.0), (500.0, 50.0), (1000.0, 100.0)], 100.0, 20.0)])
    pictures = []
    for number, order in enumerate(((), ("m", "other"), ("other", "m"))):
        figures.seconds(results, tmp_path / f"{number}.png", order)
        pictures.append((tmp_path / f"{number}.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def curve(*returns: float, steps: int, seconds: float) -> dict[str, Any]:
    """Fields of a row: evaluations at evenly spaced steps, the last one at the end; seconds grow evenly."""
    parts = np.linspace(0, 1, len(returns))
    points = [
        {"step": int(part * steps), "cpu_seconds": part * seconds, "greedy": value}
        for part, value in zip(parts, returns, strict=True)
    ]
    return {"curve": points, "steps_done": steps, "train_cpu_seconds": seconds, "train_seconds": seconds}


def test_the_clock_of_a_row_begins_with_training_and_ends_with_all_of_its_seconds(tmp_path: Path) -> None:
    says = curve(0.0, 300.0, 500.0, steps=1000, seconds=8.0)
    says["curve"][0]["cpu_seconds"] = 0.7  # what was done before training
    made_rows.write(tmp_path, "evidence.yaml", {"sb3-ppo/CartPole-v1": [500.0]}, **says)
    (found,) = of_rows(read_rows(tmp_path / "rows.jsonl")).runs["CartPole-v1"]["sb3-ppo"]
    assert found.clock == [(0.0, 0.0), (500.0, 4.0), (1000.0, 8.0)]


def test_rows_become_the_tables_and_pictures_of_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    slow, fast = (curve(24.0, 250.0, 500.0, steps=100_000, seconds=s) for s in (40.0, 4.0))
    made_rows.write(folder, "evidence.yaml", {"sb3-ppo/CartPole-v1": PPO}, peak_memory_mb=400.0, **slow)
    made_rows.write(folder, "evidence.yaml", {"grouprl-preset/CartPole-v1": [498.0, 500.0, 500.0]}, **fast)
    made_rows.write(folder, "evidence.yaml", {"outcome/CartPole-v1": [100.0]}, **fast)
    made_rows.write(
        folder, "evidence.yaml", {"sb3-ppo/Pendulum-v1": [-200.0], "grouprl-preset/Pendulum-v1": [-150.0]},
        **curve(-1250.0, -200.0, steps=150_000, seconds=5.0),
    )  # fmt: skip
    text = evidence.report(read(folder))
    assert "\n9 of 1,227 runs are done. Of each method: grouprl-default, timestep, tutorial-script" in text
    assert (
        "tutorial-formula: 0 of 126; grouprl-preset, sb3-ppo: 4 of 126; outcome: 1 of 126; sbx-ppo: 0 of 80; " in text
    )
    assert (
        "| CartPole-v1 | sb3-ppo | 100,000 | 3 | 402.0 [400.0, 404.0] | 400.0 to 404.0 |  | 40.0 | 2,500 | 400.0 |"
    ) in text
    # (499.33 - 24) / (402 - 24) = 1.257
    assert (
        "| CartPole-v1 | grouprl-preset | 499.3 [498.0, 500.0] | 402.0 [400.0, 404.0] | 3, 3 | 1.26 "
        "| 1.00 [1.00, 1.00] | above |"
    ) in text
    assert "| Pendulum-v1 | grouprl-preset | -150.0 | -200.0 | 1, 1 | 1.05 | 1.00 | too few seeds |" in text
    assert "- grouprl-preset, beside PPO: above on 1 (CartPole-v1); too few seeds on 1 (Pendulum-v1).\n" in text
    assert "- grouprl-default, beside PPO: no environment has runs of both.\n" in text
    # one seed on Pendulum-v1 has no interval, so the methods are compared on CartPole-v1: (499.33 - 402) / 451
    assert "| grouprl-preset | 1 | 1.05 [1.05, 1.06] | +0.216 [+0.2" in text
    # PPO: from 250 at half to 402 at the end, where it is 402 for the first time; the preset, to 499.33: at 81 %
    assert "| CartPole-v1 | 402.0 | 3.24 s, 81,000 | not reached | 40.0 s, 100,000 | grouprl-preset |" in text
    assert "| first on so many |  | 2 | 0 | 0 |  |" in text
    assert "| CartPole-v1 | 100,000 | 402.0 [400.0, 404.0] | 500 @100k | 490 @500k |" in text
    for name in ("curves", "scores", "seconds"):
        assert f"](rows/evidence-{name}.png)" in text
        assert (folder / f"evidence-{name}.png").stat().st_size > 1000


def test_ppo_of_another_library_has_seconds_to_the_same_score(tmp_path: Path) -> None:
    for method, seconds in (("sb3-ppo", 40.0), ("sbx-ppo", 16.0), ("grouprl-preset", 4.0)):
        says = curve(24.0, 402.0, steps=100_000, seconds=seconds)
        made_rows.write(tmp_path, "evidence.yaml", {f"{method}/CartPole-v1": [402.0]}, **says)
    benchmark = read(tmp_path)
    table = evidence.wall_clock(benchmark.results)
    assert "| environment | PPO's final IQM | grouprl-preset | sb3-ppo | sbx-ppo | first |" in table
    assert "| CartPole-v1 | 402.0 | 4 s, 100,000 | 40.0 s, 100,000 | 16.0 s, 100,000 | grouprl-preset |" in table
    # What is said beside PPO stays beside Stable-Baselines3's.
    assert "sbx-ppo" not in evidence.beside_ppo(benchmark.results, benchmark.plan.scales)


def test_there_is_no_target_where_ppo_ends_where_it_began(tmp_path: Path) -> None:
    flat = curve(-200.0, -200.0, steps=300_000, seconds=9.0)
    made_rows.write(tmp_path, "evidence.yaml", {"sb3-ppo/MountainCar-v0": [-200.0]}, **flat)
    made_rows.write(tmp_path, "evidence.yaml", {"outcome/MountainCar-v0": [-120.0]}, **flat)
    table = evidence.wall_clock(read(tmp_path).results)
    assert "| MountainCar-v0 | -200.0, not above its first |  |  |  |" in table
    assert "| first on so many |  | 0 | 0 |  |" in table


def test_nobody_is_first_to_a_score_that_an_untrained_policy_has(tmp_path: Path) -> None:
    rising, steady = (curve(start, -200.0, steps=200_000, seconds=9.0) for start in (-600.0, -200.0))
    made_rows.write(tmp_path, "evidence.yaml", {"sb3-ppo/Taxi-v4": [-200.0]}, **rising)
    made_rows.write(tmp_path, "evidence.yaml", {"grouprl-preset/Taxi-v4": [-200.0]}, **steady)
    table = evidence.wall_clock(read(tmp_path).results)
    assert "none, an untrained policy has it |" in table
    assert "| first on so many |  | 0 | 0 |  |" in table


def test_a_failed_run_is_named_and_counts_nowhere(tmp_path: Path) -> None:
    made_rows.write(tmp_path, "evidence.yaml", {"ars/CartPole-v1": [9.0]}, status="failed", error="no")
    text = evidence.report(read(tmp_path))
    assert "0 of 1,227 runs are done" in text
    assert "Failed: ars/CartPole-v1/0." in text
    assert text.count("##") == 1  # nothing but which runs there are


def test_rows_of_one_method_alone_are_a_report(tmp_path: Path) -> None:
    says = curve(24.0, 402.0, steps=100_000, seconds=4.0)
    made_rows.write(tmp_path, "evidence.yaml", {"sb3-ppo/CartPole-v1": [402.0]}, **says)
    text = evidence.report(read(tmp_path))
    assert "| CartPole-v1 | 402.0 | 4 s, 100,000 |  |" in text
    assert "| sb3-ppo | 1 | 0.838 |  |  |" in text  # (402 - 24) / 451


def test_seconds_are_of_the_runs_on_one_processor_and_it_says_how_many_were_on_others(tmp_path: Path) -> None:
    seconds = {"train_cpu_seconds": 10.0, "steps_done": 100_000}
    made_rows.write(tmp_path, "evidence.yaml", {"sb3-ppo/CartPole-v1": PPO}, **seconds)
    slow = {"train_cpu_seconds": 50.0, "steps_done": 100_000, "machine": {"processor": "slow", "cores": 2}}
    made_rows.write(tmp_path, "evidence.yaml", {"sb3-ppo/Acrobot-v1": PPO[:2]}, **slow)
    made_rows.write(tmp_path, "evidence.yaml", {"grouprl-preset/Acrobot-v1": PPO[:1]}, **slow)
    made_rows.write(tmp_path, "evidence.yaml", {"sbx-ppo/Acrobot-v1": PPO[:3]}, **seconds)
    results = read(tmp_path).results
    timed, left_out = evidence.of_one_processor(results)
    assert left_out.endswith("most methods ran on there (P or slow); 3 runs on another one are left out.")
    assert {subject: list(by) for subject, by in timed.runs.items()} == {
        "CartPole-v1": ["sb3-ppo"], "Acrobot-v1": ["grouprl-preset", "sb3-ppo"],
    }  # fmt: skip
    told = evidence.each_environment(results, timed).splitlines()
    assert " 10.0 | 10,000 | " in told[2]
    assert told[5].endswith("|  |  |  |")  # its returns are there, its seconds are not
    alone = read(tmp_path).results
    alone.runs.pop("Acrobot-v1")
    assert evidence.of_one_processor(alone)[1] == ""

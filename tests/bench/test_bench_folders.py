"""Tables of run folders that exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_rows
import pytest

from grouprl.bench import harness
from grouprl.bench.cells import ENVIRONMENTS, Cell
from grouprl.bench.folders import of_folders
from grouprl.errors import UsageError
from grouprl.runs import MetricsLog, RunFolder


def folder(path: Path, seed: int, greedy: float | None, *, steps: int = 100, **config: Any) -> Path:
    """A run folder with two rows of metrics; finished, if it has a result."""
    about = {
        "env_id": "CartPole-v1", "seed": seed, "run": {"total_timesteps": steps},
        "config": {"learning_rate": 0.1, "seed": seed, **config},
    }  # fmt: skip
    made = RunFolder.create(path, about)
    with MetricsLog(made.metrics_path) as log:
        log.append({"step": steps // 2, "eval_return": 1.0, "entropy": 0.5})
        log.append({"step": steps, "eval_return": greedy, "entropy": 0.25})
    if greedy is not None:
        made.summary_path.write_text(json.dumps({"eval": {"mean_return": greedy}, "train_seconds": 2.0}))
    return path


def test_seeds_of_a_setting_are_one_line(tmp_path: Path) -> None:
    runs = [folder(tmp_path / f"a{seed}", seed, 100.0 + seed) for seed in range(5)]
    runs += [folder(tmp_path / f"b{seed}", seed, 50.0, learning_rate=0.2) for seed in range(5)]
    results = of_folders(runs)
    assert results.settings == ["learning_rate=0.1", "learning_rate=0.2"]
    assert results.scores("CartPole-v1", "learning_rate=0.1", "greedy").tolist() == [100, 101, 102, 103, 104]
    assert results.scores("CartPole-v1", "learning_rate=0.2", "entropy").tolist() == [0.25] * 5
    assert results.notes == []
    text = harness.table_text(results, "greedy", None)
    assert "| CartPole-v1 | learning_rate=0.1 | 100 | 5 | 102.0 [" in text
    assert (
        "| CartPole-v1 | learning_rate=0.2 | 100 | 5 | 50.0 [50.0, 50.0] | 50.0 to 50.0 | 0.00 [0.00, 0.00] |" in text
    )
    assert "Note" not in text
    harness.draw(results, "greedy", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_one_seed_is_never_counted_twice(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "a", 0, 1.0), folder(tmp_path / "b", 0, 3.0)
    (tmp_path / "link").symlink_to(first)
    twice = of_folders([first, second])
    assert len(twice.scores("CartPole-v1", "CartPole-v1", "greedy")) == 1
    assert "has seed 0 several times; it counts once" in twice.notes[0]
    same = of_folders([first, first, tmp_path / "link"])
    assert len(same.scores("CartPole-v1", "CartPole-v1", "greedy")) == 1
    assert same.notes == []


def test_settings_that_differ_in_more_than_a_label_says_stay_apart(tmp_path: Path) -> None:
    runs = [
        folder(tmp_path / str(i), 0, float(i), a=i % 2, b=i % 2, c=i % 2, d=i)
        for i in range(4)
    ]  # fmt: skip
    assert len(of_folders(runs).settings) == 4


def test_runs_that_differ_in_the_seed_of_their_environment_stay_apart(tmp_path: Path) -> None:
    runs = [folder(tmp_path / f"r{level}", 0, 100.0, level={"seed": level}) for level in range(2)]
    assert len(of_folders(runs).settings) == 2


def rows_of(path: Path, returns: list[float], **given: Any) -> Path:
    """A folder with rows of a benchmark: a run for each return, of seeds 0, 1, 2."""
    path.mkdir(exist_ok=True)
    with (path / "rows.jsonl").open("a") as file:
        for seed, mean in enumerate(returns):
            cell = Cell("ours", "Env", ENVIRONMENTS, seed=seed, **{"steps": 100, **given})
            file.write(made_rows.line(cell, greedy={"mean": mean, "returns": [mean]}, seed=seed, method="ours"))
    return path


def test_rows_of_one_name_with_other_settings_are_not_pooled(tmp_path: Path) -> None:
    rows_of(tmp_path / "a", [1.0, 2.0, 3.0], settings={"base": 50})
    rows_of(tmp_path / "a", [10.0, 20.0], settings={"base": 150})
    results = of_folders([tmp_path / "a"])
    assert results.scores("Env", "ours", "greedy").tolist() == [10.0, 20.0]
    (note,) = results.notes
    assert note.startswith(
        "3 runs called ours on Env had other settings, steps or code than the rest, and are left out"
    )
    rows_of(tmp_path / "a", [5.0], steps=10, settings={"base": 150})  # a trial
    assert of_folders([tmp_path / "a"]).scores("Env", "ours", "greedy").tolist() == [10.0, 20.0]


def test_a_run_that_goes_on_has_no_result_and_says_so(tmp_path: Path) -> None:
    results = of_folders([folder(tmp_path / "a", 0, None), folder(tmp_path / "b", 1, 5.0)])
    assert results.scores("CartPole-v1", "CartPole-v1", "greedy").tolist() == [5.0]
    assert results.notes == [f"{tmp_path / 'a'} is not finished"]


def test_a_metric_that_no_run_has_and_a_folder_of_nothing_are_one_line(tmp_path: Path) -> None:
    results = of_folders([folder(tmp_path / "a", 0, 1.0)])
    with pytest.raises(UsageError, match="no run has the metric 'entropi'; did you mean 'entropy'"):
        harness.table_text(results, "entropi", None)
    with pytest.raises(UsageError, match="There is no run folder"):
        of_folders([tmp_path / "none"])


def test_a_benchmark_without_a_run_that_is_done_says_so(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(UsageError, match="no run is done yet"):
        harness.table_text(of_folders([tmp_path]), "greedy", None)

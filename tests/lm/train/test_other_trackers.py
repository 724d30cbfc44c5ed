"""Trackers by transformers' callbacks, and completions as tables."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import trainer
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from grouprl.errors import UsageError
from grouprl.lm.settings.trackers import TRACKERS


def test_the_trackers_are_transformers_own() -> None:
    assert set(TRACKERS) == set(integration_utils.INTEGRATION_TO_CALLBACK)


def test_a_tracker_that_is_not_installed_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_clearml_available", lambda: False)
    with pytest.raises(UsageError, match=r"report_to='clearml' cannot be used: ClearMLCallback requires") as said:
        trainer(tmp_path, report_to="clearml")
    assert "\n" not in str(said.value)


def test_a_callback_that_could_not_be_made_leaves_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    monkeypatch.setattr(integration_utils, "is_mlflow_available", lambda: False)
    with pytest.raises(UsageError, match="report_to='mlflow' cannot be used") as said:
        trainer(tmp_path, report_to="mlflow")
    del said
    gc.collect()
    assert not unraisable


class Told(TrainerCallback):
    """Stands in for the callback of a tracker."""

    made: list[Told] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.began: dict[str, Any] = {}
        self.made.append(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.began = {**model.config.to_dict(), **args.to_dict(), "name": args.run_name, "project": args.project}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})


def test_a_tracker_hears_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "swanlab", Told)
    made = trainer(tmp_path, report_to=["swanlab"], max_steps=2, run_name="mine", project="p")
    made.train()
    told = Told.made[-1]
    assert (told.began["name"], told.began["project"], told.began["learning_rate"]) == ("mine", "p", 1e-3)
    assert told.logs == made.state.log_history
    assert [entry["step"] for entry in told.logs if "loss" in entry] == [1, 2]


class Board:
    """Stands in for the package wandb."""

    run = None

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
            self.columns, self.data = columns, data

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []

    def init(self, **given: Any) -> Board:
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append((metrics, step))

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("log_completions", [True, False])
def test_weights_and_biases_gets_a_table_of_completions(
    log_completions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    monkeypatch.setattr("grouprl.runs.trackers.check_trackers", lambda names: None)

    def judged(completions: list[str], log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        return [float(i) for i, _ in enumerate(completions)]

    made = trainer(
        tmp_path, reward=judged, report_to="wandb", max_steps=2, log_completions=log_completions,
        num_completions_to_print=1,
    )  # fmt: skip
    made.train()
    tables = [(metrics["completions"], step) for metrics, step in board.logged if "completions" in metrics]
    assert [step for _, step in tables] == ([1, 2] if log_completions else [])
    for table, step in tables:
        assert table.columns == ["step", "prompt", "completion", "judged", "length", "advantage"]
        assert [row[0] for row in table.data] == [step] * 8
        assert [row[3] for row in table.data] == [float(i) for i in range(8)]
        assert all(row[4] == len(row[2]) for row in table.data)
        assert [row[5] > 0 for row in table.data] == [False, False, True, True] * 2


def test_mlflow_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path / 'mlruns'}")
    made = trainer(tmp_path / "run", report_to="mlflow", max_steps=2, run_name="mine")
    made.train()
    made.callback_handler.callbacks.clear()  # ends mlflow's run
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.run_name == "mine"
    assert run.data.params["learning_rate"] == "0.001"
    client = mlflow.tracking.MlflowClient()
    kept = [metric.value for metric in client.get_metric_history(run.info.run_id, "reward")]
    assert kept == [entry["reward"] for entry in made.state.log_history if "reward" in entry]


def test_trackio_keeps_numbers_and_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    made = trainer(
        tmp_path / "run", report_to="trackio", max_steps=2, run_name="mine", project="p", log_completions=True
    )
    made.train()
    logs = SQLiteStorage.get_logs("p", "mine")
    rewards = [entry["train/reward"] for entry in logs if "train/reward" in entry]
    assert rewards == [entry["reward"] for entry in made.state.log_history if "reward" in entry]
    tables = [entry["completions"] for entry in logs if "completions" in entry]
    assert len(tables) == 2
    assert len(tables[0]["_value"]) == 8
    assert tables[0]["_value"][0]["completion"]

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from grouprl.errors import UsageError
from grouprl.runs.trackers import TensorBoardTracker, Tracker, WandbTracker, _wandb_login, make_trackers


def make(folder: Path, *names: str) -> list[Tracker]:
    return make_trackers(
        names, tensorboard_folder=folder / "tb", wandb_folder=folder / "wb", project="p", name="n", config={"a": 1}
    )


def read_events(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    tracker.log({"return_mean": 20.5, "update": 1, "eval_return": None}, step=2048)
    tracker.log({"return_mean": 30.0, "update": 2, "eval_return": 500.0}, step=4096)
    tracker.close()
    assert read_events(tmp_path, "return_mean") == [(2048, 20.5), (4096, 30.0)]
    assert read_events(tmp_path, "update") == [(2048, 1.0), (4096, 2.0)]
    assert read_events(tmp_path, "eval_return") == [(4096, 500.0)]


def test_events_can_be_read_before_the_tracker_is_closed(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    tracker.log({"x": 1.5}, step=1)
    assert read_events(tmp_path, "x") == [(1, 1.5)]
    tracker.close()


def test_a_resumed_run_replaces_the_events_from_the_step_it_goes_on_from(tmp_path: Path) -> None:
    first = TensorBoardTracker(tmp_path)
    for step in (1, 2, 3, 4):
        first.log({"x": float(step)}, step)
    first.close()
    second = TensorBoardTracker(tmp_path)
    for step in (3, 4, 5):
        second.log({"x": 10.0 * step}, step)
    second.close()
    assert read_events(tmp_path, "x") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_each_name_makes_its_tracker_once_and_none_makes_nothing(tmp_path: Path) -> None:
    trackers = make(tmp_path, "tensorboard", "tensorboard")
    assert [type(tracker) for tracker in trackers] == [TensorBoardTracker]
    trackers[0].close()
    assert make(tmp_path, "none") == []
    assert make(tmp_path) == []


def test_an_unknown_tracker_is_refused_with_those_that_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'tensorbord'.*tensorboard, wandb, none"):
        make(tmp_path, "tensorbord")
    assert list(tmp_path.iterdir()) == []


def test_none_beside_another_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="excludes"):
        make(tmp_path, "none", "tensorboard")


def test_a_missing_wandb_is_a_usage_error_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install"):
        make(tmp_path, "wandb")


def test_a_wandb_login_is_a_key_or_an_entry_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert not _wandb_login()
    netrc.write_text("machine example.org login a password b\n")
    assert not _wandb_login()
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    assert _wandb_login()
    monkeypatch.setenv("NETRC", str(tmp_path / "missing"))
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert _wandb_login()


def test_wandb_without_an_account_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is an optional extra: pip install 'grouprl[wandb]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "missing"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WandbTracker(tmp_path / "run", "p", "n", {"lr": 0.1})
    tracker.log({"return_mean": 1.5, "eval_return": None}, step=1)
    tracker.close()
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


class Board:
    """Stands in for the package wandb."""

    def __init__(self, run: object = None) -> None:
        self.run, self.asked = run, []

    def init(self, **given: object) -> object:
        self.asked.append(given)
        return OfBoard()


class OfBoard:
    finished = 0

    def log(self, metrics: dict, step: int) -> None:
        pass

    def finish(self) -> None:
        self.finished += 1


def test_a_run_of_wandb_that_is_open_is_used_and_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(OfBoard())
    monkeypatch.setitem(sys.modules, "wandb", board)
    tracker = WandbTracker(tmp_path, "p", "n", {}, "offline")
    tracker.log({"x": 1.0}, 1)
    tracker.close()
    assert (board.asked, board.run.finished) == ([], 0)


def test_the_environment_names_the_project_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    tracker = WandbTracker(tmp_path, "p", "n", {}, "offline")
    tracker.close()
    assert board.asked[0]["project"] == "mine"
    assert tracker._run.finished == 1


def test_an_event_file_deleted_under_a_run_is_said_and_followed_by_another(tmp_path: Path, caplog: Any) -> None:
    tracker = TensorBoardTracker(tmp_path / "tb")
    tracker.log({"x": 1.0}, step=1)
    shutil.rmtree(tmp_path / "tb")
    for step in (2, 3):
        tracker.log({"x": float(step)}, step)
    tracker.close()
    assert read_events(tmp_path / "tb", "x") == [(2, 2.0), (3, 3.0)]
    (message,) = caplog.messages
    assert "was deleted while this run writes there" in message

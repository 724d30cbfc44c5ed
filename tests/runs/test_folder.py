import json
import os
from pathlib import Path

import pytest
import torch

from grouprl.errors import TrainingError, UsageError
from grouprl.runs import RunFolder, default_run_path, save_state

CONFIG = {"env_id": "CartPole-v1", "seed": 1, "config": {"learning_rate": 3e-4, "hidden": [64, 64]}}


def test_a_created_folder_opens_again_with_the_same_configuration(tmp_path: Path) -> None:
    created = RunFolder.create(tmp_path / "deep" / "run", CONFIG)
    opened = RunFolder.open(tmp_path / "deep" / "run")
    assert opened == created
    assert opened.read_config() == CONFIG


def test_every_path_is_where_the_layout_says(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    paths = [
        run.config_path, run.metrics_path, run.tensorboard_path, run.model_path, run.checkpoint_path(12345),
        run.curve_path, run.video_path, run.summary_path,
    ]  # fmt: skip
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "config.yaml", "metrics.csv", "tensorboard", "model.safetensors", "checkpoints/step_000000012345.safetensors",
        "curve.png", "episode.mp4", "summary.json",
    ]  # fmt: skip


def test_a_folder_that_holds_a_run_is_not_created_again(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(UsageError, match=r"already holds a run.*grouprl resume"):
        RunFolder.create(tmp_path, {})
    assert RunFolder.open(tmp_path).read_config() == CONFIG


def test_overwriting_leaves_nothing_of_the_older_run_and_nothing_else_is_deleted(tmp_path: Path) -> None:
    old = RunFolder.create(tmp_path, CONFIG)
    save_state(old.checkpoint_path(5), {}, {})
    for path in (old.metrics_path, old.model_path, old.summary_path, tmp_path / "notes.txt"):
        path.write_text("old")
    new = RunFolder.create(tmp_path, {"seed": 2}, overwrite=True)
    assert new.read_config() == {"seed": 2}
    assert new.checkpoints() == []
    assert new.model_path.exists() is new.checkpoints_path.exists() is False
    new.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def older(folder: Path) -> RunFolder:
    """A run that can be used."""
    run = RunFolder.create(folder, CONFIG)
    save_state(run.checkpoint_path(5), {}, {})
    run.metrics_path.write_text("step\n5\n")
    return run


def test_a_run_that_failed_before_its_first_step_brings_back_the_one_it_was_to_replace(tmp_path: Path) -> None:
    old = older(tmp_path)
    before = names(tmp_path)
    new = RunFolder.create(tmp_path, {"seed": 2}, overwrite=True)
    new.metrics_path.write_text("step\n0\n")
    new.tensorboard_path.mkdir()
    (tmp_path / "wandb").mkdir()
    assert new.abandon() is None
    assert names(tmp_path) == before
    assert old.read_config() == CONFIG
    assert old.metrics_path.read_text() == "step\n5\n"


def test_what_a_run_that_failed_later_recorded_lies_beside_the_one_it_was_to_replace(tmp_path: Path) -> None:
    older(tmp_path / "run")
    before = names(tmp_path / "run")
    new = RunFolder.create(tmp_path / "run", {"seed": 2}, overwrite=True)
    new.metrics_path.write_text("step\n0\n1\n")
    with pytest.raises(TrainingError, match=r"no judge\. What it recorded is in .*run-failed\."), new.kept_in_order():
        raise TrainingError("no judge")
    assert names(tmp_path / "run") == before
    assert names(tmp_path / "run-failed") == ["config.yaml", "metrics.csv"]
    again = RunFolder.create(tmp_path / "run", {"seed": 2}, overwrite=True)
    again.metrics_path.write_text("step\n1\n")
    assert again.abandon() == tmp_path / "run-failed-2"


def test_a_run_with_a_checkpoint_stays_and_the_older_one_goes(tmp_path: Path) -> None:
    older(tmp_path)
    new = RunFolder.create(tmp_path, {"seed": 2}, overwrite=True)
    save_state(new.checkpoint_path(7), {}, {})
    with pytest.raises(KeyboardInterrupt), new.kept_in_order():
        raise KeyboardInterrupt
    assert names(tmp_path) == ["checkpoints", "checkpoints/step_000000000007.safetensors", "config.yaml"]


def test_a_run_that_failed_and_was_to_replace_none_stays_if_it_recorded_a_step(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.metrics_path.write_text("step\n0\n1\n")
    assert run.abandon() == run.path
    assert run.config_path.exists()
    run.metrics_path.write_text("step\n0\n")
    assert run.abandon() is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", range(4))
def test_wherever_an_overwriting_run_is_killed_the_older_one_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    folder = tmp_path / "run"
    older(folder)
    before, moves, replace = names(folder), [], os.replace

    def killed(a: Path, b: Path) -> None:
        if len(moves) == moment:
            raise SystemExit
        moves.append(a)
        replace(a, b)

    monkeypatch.setattr("grouprl.runs.folder.os.replace", killed)
    with pytest.raises(SystemExit):  # moments 0 to 2: while files are put aside; 3: while config.yaml is written
        RunFolder.create(folder, {"seed": 2}, overwrite=True)
    monkeypatch.undo()
    assert RunFolder.open(folder).read_config() == CONFIG
    assert [name for name in names(folder) if name != ".replaced"] == before
    new = RunFolder.create(folder, {"seed": 3}, overwrite=True)  # after a kill before the first step, once more
    assert new.abandon() is None
    assert names(folder) == before


def test_files_that_cannot_be_moved_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older(tmp_path)
    before, replace = names(tmp_path), os.replace

    def refuse(a: Path, b: Path) -> None:
        if Path(a).name == "metrics.csv":
            raise PermissionError(13, "Permission denied")
        replace(a, b)

    monkeypatch.setattr("grouprl.runs.folder.os.replace", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        RunFolder.create(tmp_path, {"seed": 2}, overwrite=True)
    assert names(tmp_path) == before


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="Choose another folder"):
        RunFolder.create(tmp_path, CONFIG, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Cannot write"):
        RunFolder.create(tmp_path / "file", CONFIG)


def test_a_configuration_that_yaml_cannot_hold_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="YAML"):
        RunFolder.create(tmp_path / "run", {"path": Path("x")})
    assert not (tmp_path / "run").exists()


def test_opening_what_is_missing_or_no_run_says_which(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no run folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no config\.yaml"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", ""], ids=["syntax", "list", "empty"])
def test_a_damaged_configuration_is_a_usage_error_naming_the_file(tmp_path: Path, text: str) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    run.config_path.write_text(text)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        run.read_config()


@pytest.mark.parametrize("change", ["nothing", "a value", "the end is cut off", "written by hand"])
def test_a_configuration_that_is_not_as_it_was_left_is_read_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    run = RunFolder.create(tmp_path, {"seed": 1, "env_id": str(tmp_path)})
    text = run.config_path.read_text()
    changed = {
        "nothing": text, "a value": text.replace("seed: 1", "seed: 2"), "the end is cut off": text[: text.index("#")],
        "written by hand": f"# mine\nenv_id: {tmp_path}\nseed: 3\n",
    }  # fmt: skip
    run.config_path.write_text(changed[change])
    seed = {"a value": 2, "written by hand": 3}.get(change, 1)
    assert run.read_config() == {"seed": seed, "env_id": str(tmp_path)}
    assert (f"{run.config_path} is not as grouprl left it" in caplog.text) == (change != "nothing")


def test_the_summary_is_json_in_which_nan_is_null(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    run.model_path.touch()
    run.write_summary({"eval_return": 500.0, "solved_at": float("nan")})
    assert json.loads(run.summary_path.read_text()) == {"eval_return": 500.0, "solved_at": None}


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_there_is_no_summary_of_a_run_that_was_deleted_before_it(tmp_path: Path, name: str) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    run.model_path.touch()
    (tmp_path / name).unlink()
    with pytest.raises(TrainingError, match="holds no run any more"):
        run.write_summary({"eval_return": 500.0})
    assert not run.is_finished()


def test_checkpoints_are_sorted_by_step_and_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    steps = [20, 3, 10**13, 100]  # the third has more digits than the name is padded to
    for step in steps:
        save_state(run.checkpoint_path(step), {}, {"step": step})
    (run.checkpoints_path / ".step_000000000099.abcd.tmp.safetensors").touch()
    (run.checkpoints_path / "notes.txt").touch()
    assert run.checkpoints() == [run.checkpoint_path(step) for step in sorted(steps)]


def test_the_latest_checkpoint_skips_damaged_ones_and_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    for step in (1, 2, 3):
        save_state(run.checkpoint_path(step), {"a": torch.ones(100)}, {})
    assert run.latest_checkpoint() == run.checkpoint_path(3)
    assert caplog.messages == []
    content = run.checkpoint_path(3).read_bytes()
    run.checkpoint_path(3).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run.latest_checkpoint() == run.checkpoint_path(2)
    assert "step_000000000003.safetensors is damaged: 'a' is not what was saved" in caplog.text


def test_without_checkpoints_there_is_no_latest_one(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, CONFIG).latest_checkpoint() is None


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, CONFIG)
    for step in (1, 2, 3, 4):
        save_state(run.checkpoint_path(step), {}, {})
    run.prune_checkpoints(9)
    assert len(run.checkpoints()) == 4
    run.prune_checkpoints(2)
    assert run.checkpoints() == [run.checkpoint_path(3), run.checkpoint_path(4)]
    with pytest.raises(UsageError, match="at least 1"):
        run.prune_checkpoints(0)


def test_default_paths_are_readable_unique_and_one_folder_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grouprl.runs.folder.time.strftime", lambda form: "20260101-120000")
    first = default_run_path(tmp_path, "ALE/Pong-v5", 1)
    assert first == tmp_path / "ALE-Pong-v5-seed1-20260101-120000"
    first.mkdir()
    second = default_run_path(tmp_path, "ALE/Pong-v5", 1)
    assert second.name == "ALE-Pong-v5-seed1-20260101-120000-2"
    second.mkdir()
    assert default_run_path(tmp_path, "ALE/Pong-v5", 1).name == "ALE-Pong-v5-seed1-20260101-120000-3"
    assert default_run_path(tmp_path, "../..", 1).parent == tmp_path


def test_a_folder_given_relative_to_another_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("runs/a", {"seed": 1})
    opened = RunFolder.open("runs/a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert folder.read_config() == opened.read_config() == {"seed": 1}
    assert folder.path == tmp_path / "runs" / "a"

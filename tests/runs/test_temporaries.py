"""What a process that was killed left half written is removed by the next, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grouprl.errors import UsageError
from grouprl.runs import RunFolder
from grouprl.runs.files import atomic_path, write_text
from grouprl.runs.lock import locked
from grouprl.runs.temporaries import beside, remove_left_over

DIE = """
import os, sys
from grouprl.runs.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half of the n")
    os._exit(9)
"""


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def die_writing(path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", DIE, str(path)], check=False).returncode == 9


def test_the_next_write_of_a_file_removes_what_a_killed_one_left_of_it(tmp_path: Path) -> None:
    write_text(tmp_path / "agent.safetensors", "old")
    die_writing(tmp_path / "agent.safetensors")
    die_writing(tmp_path / "other.safetensors")
    assert len(names(tmp_path)) == 3
    assert (tmp_path / "agent.safetensors").read_text() == "old"
    write_text(tmp_path / "agent.safetensors", "new")
    assert len(names(tmp_path)) == 2  # the other one's is left to whoever writes the other one
    write_text(tmp_path / "other.safetensors", "new")
    assert names(tmp_path) == ["agent.safetensors", "other.safetensors"]


def test_whoever_takes_a_run_folder_removes_all_that_killed_ones_left(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    write_text(run.config_path, "{}")
    for path in (run.checkpoint_path(5), run.curve_path, run.metrics_path):
        die_writing(path)
    ours, foreign = beside(run.video_path, suffix=".mp4"), run.path / ".notes.tmp"
    ours.touch()
    foreign.touch()
    with run.locked():
        assert names(run.path) == sorted([ours.name, foreign.name, ".lock", "checkpoints", "config.yaml"])


def test_a_run_can_begin_where_one_was_killed_while_it_wrote_its_first_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    die_writing(run.config_path)
    run.check_free(overwrite=False)
    with run.locked():
        RunFolder.create(run.path, {"seed": 1})
        assert names(run.path) == [".lock", "config.yaml"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    target = tmp_path / "file"
    others = tmp_path / f".file.{os.getppid()}-0123abcd-0.tmp"
    others.touch()
    with atomic_path(target) as temporary:
        write_text(target, "in between")
        remove_left_over(tmp_path)
        assert temporary.exists()
        temporary.write_text("last")
    assert (target.read_text(), others.exists()) == ("last", True)


def test_a_process_of_the_same_number_that_is_dead_is_told_from_this_one(tmp_path: Path) -> None:
    """As in containers, where each is number 1."""
    left = tmp_path / f".file.{os.getpid()}-0123abcd-0.tmp"
    left.touch()
    write_text(tmp_path / "file", "whole")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_was_moved_away_to_be_replaced_comes_back(tmp_path: Path, replaced: bool) -> None:
    dead = f"{2**22 + 1}-0123abcd-0"  # more than there can be
    for name in (f".model.{dead}.old", f".model.{dead}.tmp", *(["model"] if replaced else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with locked(tmp_path):
        assert names(tmp_path) == [".lock", "model", "model/file"]
    assert (tmp_path / "model" / "file").read_text() == ("model" if replaced else f".model.{dead}.old")


@pytest.mark.parametrize("path", ["", ".", "/", "..", "runs/.."])
def test_nothing_is_written_in_the_place_of_a_folder_without_a_name(path: str) -> None:
    with pytest.raises(UsageError, match="is a folder that is there already"), atomic_path(Path(path)):
        pytest.fail("there is nothing to write")

"""A file that grows loses no line, whatever becomes of it meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from grouprl.errors import TrainingError
from grouprl.runs import MetricsLog
from grouprl.runs.appended import AppendedFile
from grouprl.runs.files import write_text
from grouprl.runs.lock import locked


def move(path: Path) -> None:
    os.replace(path, path.with_name("moved"))


@pytest.mark.parametrize("lose", [Path.unlink, move])
def test_a_file_that_is_deleted_or_moved_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lose: Callable[[Path], object]
) -> None:
    file = AppendedFile(tmp_path / "log.txt")
    file.append("one\n")
    lose(file.path)
    file.append("two\n")
    assert file.path.read_text() == "one\ntwo\n"
    assert "log.txt was deleted, moved or replaced while this run is writing it" in caplog.text
    lose(file.path)
    file.close()  # the last line is not lost either
    assert file.path.read_text() == "one\ntwo\n"


def test_what_lies_in_the_place_of_a_file_that_grows_is_kept(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "log.txt")
    file.append("one\n")
    write_text(file.path, "edited\n")
    file.append("two\n")
    file.close()
    assert file.path.read_text() == "one\ntwo\n"
    assert (tmp_path / "log.txt.other").read_text() == "edited\n"


@pytest.mark.parametrize("held", [b"", b"onE\nmore\n"])
def test_a_file_that_is_changed_by_another_program_is_an_error(tmp_path: Path, held: bytes) -> None:
    file = AppendedFile(tmp_path / "log.txt")
    file.append("one\n")
    with file.path.open("r+b") as other:
        other.truncate(len(held))
        other.write(held)
    with pytest.raises(TrainingError, match="was changed or deleted by another program"):
        file.append("two\n")


def test_a_new_column_after_the_metrics_were_deleted_loses_no_row(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.csv") as log:
        log.append({"step": 1})
        log.path.unlink()
        log.append({"step": 2, "loss": 0.5})
    assert log.path.read_text() == "step,loss\n1,\n2,0.5\n"


@pytest.mark.parametrize("instead", [None, "another"])
def test_a_folder_that_is_gone_is_an_error_and_is_not_made_anew(tmp_path: Path, instead: str | None) -> None:
    folder = tmp_path / "run"
    with locked(folder):
        file = AppendedFile(folder / "log.txt")
        file.append("one\n")
        folder.rename(tmp_path / "elsewhere")
        if instead:
            folder.mkdir()
        for write in (lambda: file.append("two\n"), lambda: write_text(folder / "summary.json", "{}")):
            with pytest.raises(TrainingError, match="was deleted, moved or replaced by another since this run began"):
                write()
    assert folder.exists() == (instead is not None)
    write_text(folder / "summary.json", "{}")  # nobody holds it any more
    shutil.rmtree(folder)

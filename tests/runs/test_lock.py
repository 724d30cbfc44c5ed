"""One process at a time writes a run folder, and a lock never outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from grouprl.errors import UsageError
from grouprl.runs import RunFolder
from grouprl.runs.lock import LOCK, locked

HOLD = """
import sys, time, os
from pathlib import Path
from grouprl.runs.lock import locked
with locked(Path(sys.argv[1])):
    ready, tell = os.pipe()
    if sys.argv[2] == "fork":
        if os.fork() == 0:
            os.write(tell, b".")  # it runs, and so has let go of what its parent holds
            time.sleep(60)
        os.read(ready, 1)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder `run`."""
    how = getattr(request, "param", "alone")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), how], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_folder_that_a_process_holds_is_refused_and_the_process_is_named(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(UsageError, match=rf"in use by process {holder.pid} on .+ since"), locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("holder", ["alone", "fork"], indirect=True)
def test_a_killed_process_holds_nothing_even_if_its_workers_live_on(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_thread_that_holds_a_folder_may_lock_it_again_and_no_other_may(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path):
                pass
        except UsageError as error:
            refused.append(str(error))

    with locked(tmp_path), locked(tmp_path / "." / ""):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / LOCK).exists()
    assert "another thread" in refused[0]
    with locked(tmp_path):
        pass


def test_a_lock_is_no_content_of_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        RunFolder.create(folder.path, {"a": 1})
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml"]
    with RunFolder(tmp_path / "none").locked():
        pass
    assert not (tmp_path / "none").exists()


def test_a_lock_file_that_is_a_folder_or_a_link_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a" / LOCK).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LOCK).symlink_to(tmp_path / "elsewhere")
    for name in "ab":
        with pytest.raises(UsageError, match=rf"Cannot write .*{name}/\.lock"), locked(tmp_path / name):
            pass
    assert not (tmp_path / "elsewhere").exists()

"""A compiler that hangs, is killed or writes rubbish costs one start at most, and is named once."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grouprl.machine import compile as compiling
from grouprl.machine import compiler
from grouprl.machine.compile import Kernels, UnavailableError

if sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")):
    pytest.skip("there is no C compiler on this machine", allow_module_level=True)


def kernels(source: Path) -> Kernels:
    return Kernels(source, ["answer.c"], variants=[("-DVALUE=26",)])


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Makes $CC a script that says its version and then does something else, and counts its runs."""
    script, runs = tmp_path / "pretended", tmp_path / "runs"

    def make(body: str, version: str = "echo 1") -> Path:
        asked = f'if [ "$1" = --version ]; then echo asked >> {runs}; {version}; exit; fi'
        script.write_text(f"#!/bin/sh\n{asked}\necho run >> {runs}\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        return runs

    return make


def test_a_compiler_that_cannot_be_started_for_want_of_files_is_said(source, own_cache, monkeypatch, caplog) -> None:
    def no_more(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(subprocess, "Popen", no_more)
    with caplog.at_level(logging.WARNING, "grouprl"), pytest.raises(UnavailableError, match="Too many open files"):
        kernels(source).functions()
    (message,) = caplog.messages
    assert "There is no compiled code" in message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("for last; do :; done; echo rubbish > made.so", "wrote no whole library"),
        ('gcc "$@"; [ ! -f made.so ] || truncate -s 6000 made.so', "wrote no whole library"),
        ("exit 0", "wrote no whole library"),
        ("mkdir -p made.so", "wrote no whole library"),
        ("echo it is broken >&2; exit 1", "it is broken"),
    ],
)
def test_rubbish_is_not_kept_and_is_said_once(body, message, source, own_cache, pretended, caplog) -> None:
    pretended(body)
    with caplog.at_level(logging.WARNING, "grouprl"):
        for _ in range(2):
            with pytest.raises(UnavailableError, match=message):
                kernels(source).functions()
    assert len(caplog.messages) == 1
    assert list(own_cache.iterdir()) == []
    pretended('gcc "$@"')
    assert kernels(source).functions().answer() == 42


def test_a_library_without_its_functions_is_refused(source, own_cache, pretended) -> None:
    (source / "named.c").write_text("int grouprl_answer(void) { return 42; }\n")
    (source / "empty.c").write_text("int nothing;\n")
    pretended(f'[ "$1" = -shared ] && exec gcc -shared -fPIC {source}/empty.c -o made.so; exec gcc "$@"')
    with pytest.raises(UnavailableError, match="lacks grouprl_answer"):
        Kernels(source, ["named.c"]).functions()
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("when", ["compiling", "asked for its version"])
def test_a_compiler_that_hangs_is_remembered(when, source, own_cache, pretended, monkeypatch, caplog) -> None:
    monkeypatch.setattr(compiler, "COMPILE_WITHIN", 0.3)
    monkeypatch.setattr(compiler, "ANSWER_WITHIN", 5.0 if when == "compiling" else 0.3)
    sleeps = "sleep 30 & sleep 30"
    runs = pretended(sleeps) if when == "compiling" else pretended("", version=sleeps)
    for _ in range(2):  # two sets of functions in one process
        with pytest.raises(UnavailableError, match="did not finish within"):
            kernels(source).functions()
    monkeypatch.setattr(compiling, "_hanging", {})  # the next process
    before = runs.read_text()
    with pytest.raises(UnavailableError, match="tried again a day later") as caught:
        kernels(source).functions()
    assert runs.read_text() == before != ""  # the compiler was not even started
    assert "hung-" in str(caught.value)

    (memory,) = own_cache.iterdir()
    os.utime(memory, (time.time() - 90_000,) * 2)
    pretended('gcc "$@"')
    monkeypatch.setattr(compiling, "_hanging", {})
    monkeypatch.setattr(compiler, "COMPILE_WITHIN", 60.0)
    assert kernels(source).functions().answer() == 42


def test_everything_that_a_hanging_compiler_started_is_ended(source, pretended, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(compiler, "COMPILE_WITHIN", 0.3)
    pretended(f"sleep 45 & echo $! > {tmp_path}/child; wait")
    assert not kernels(source).available
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the compiler's child still runs")


RUN = """
from pathlib import Path
from grouprl.machine.compile import Kernels
print(Kernels(Path.cwd(), ["answer.c"], variants=[("-DVALUE=26",)]).functions().answer())
"""


def start(source: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RUN], cwd=source, stdout=subprocess.PIPE)


def test_what_a_killed_process_left_is_removed_at_the_next_start(source, own_cache, pretended) -> None:
    runs = pretended("sleep 60")
    process = start(source)
    while not runs.exists() or "run" not in runs.read_text():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert [path.name[:10] for path in own_cache.iterdir()] == ["compiling-"]
    os.environ["CC"] = "cc"
    assert kernels(source).functions().answer() == 42
    assert [path.suffix for path in own_cache.iterdir()] == [".so"]


def test_processes_that_start_at_once_compile_once(source, own_cache, pretended) -> None:
    runs = pretended('sleep 0.2; gcc "$@"')
    processes = [start(source) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == [b"42\n"] * 3
    assert runs.read_text().splitlines().count("run") == 2  # the compiler and the linker
    assert len(list(own_cache.iterdir())) == 1


def test_ctrl_c_while_compiling_leaves_nothing(source, own_cache, pretended) -> None:
    runs = pretended("sleep 60")
    process = start(source)
    while not runs.exists() or "run" not in runs.read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert list(own_cache.iterdir()) == []

"""Signals end a process in one line, and what was asked to be ignored is ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grouprl.runs.signals import leaving_on_signals, stopping_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_to_stop_and_the_second_one_acts(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stopping_on_signals(lambda: asked.append(True)):  # noqa: PT012
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert asked == [True]
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err.count("\n") == 2


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_on_signals(lambda: pytest.fail("heard it")), leaving_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGHUP, before)


IMPORTING = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "grouprl.cli.train_lm":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
import grouprl.cli
"""


def test_ctrl_c_while_the_command_line_is_imported_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped before anything had begun\n")


BEGINNING = """
import os, signal, sys
import grouprl.cli
number = signal.Signals[sys.argv.pop()]
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "grouprl.envs.training":
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Interrupting())
grouprl.cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_before_a_run_begins_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", BEGINNING, "train", "CartPole-v1", "--out", str(tmp_path / "run"), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped; grouprl resume goes on with a run that had begun\n")
    assert not (tmp_path / "run").exists()


SWALLOWING = """
import os, signal, sys
import grouprl.cli
what = sys.argv.pop()
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "grouprl.envs.training":
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                [None for _ in range(1000)]
            except KeyboardInterrupt:
                if what == "replaced":
                    raise ModuleNotFoundError("could not import a module") from None
sys.meta_path.insert(0, Interrupting())
grouprl.cli.main()
"""


@pytest.mark.parametrize("what", ["replaced", "swallowed"])
def test_a_signal_that_a_library_makes_something_else_of_still_ends_the_command(tmp_path: Path, what: str) -> None:
    command = ["train", "CartPole-v1", "--steps", "2000", "--out", str(tmp_path / "run"), what]
    done = subprocess.run([sys.executable, "-c", SWALLOWING, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped; grouprl resume goes on with a run that had begun\n")
    assert not (tmp_path / "run" / "model.safetensors").exists()

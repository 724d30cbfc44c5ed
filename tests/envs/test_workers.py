"""Environments in processes of their own: what they print, and that none outlives what started it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from grouprl.envs.vector import make_vector
from grouprl.envs.workers import Workers, settled
from grouprl.errors import TrainingError, UsageError


class Still(gym.Env[Any, Any]):
    observation_space = spaces.Box(-1, 1, (1000,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1000, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1000, np.float32), 1.0, False, False, {}


class Exits(Still):
    def __init__(self, how: Any) -> None:
        self.how = how

    def step(self, action: Any) -> Any:
        self.how()


def interrupt() -> None:
    raise KeyboardInterrupt


class TwoArgumentsError(Exception):
    def __init__(self, level: int, text: str) -> None:
        super().__init__(level, text)


def two_arguments() -> None:
    raise TwoArgumentsError(3, "stuck")


def workers(how: Any = None, n: int = 2) -> Workers:
    venv = make_vector(Still if how is None else lambda: Exits(how), n, "async")
    assert isinstance(venv, Workers)
    venv.reset(seed=0)
    return venv


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: 1 / 0, r"environment 0 failed in step: ZeroDivisionError.*test_workers"),
        (two_arguments, r"environment 0 failed in step: TwoArgumentsError: \(3, 'stuck'\)"),
        (interrupt, r"environment 0 failed in its worker process: KeyboardInterrupt"),
        (lambda: sys.exit(7), r"environment 0 failed in step: its worker process died.* with exit code 7"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"environment 0 .*: its worker process died.* by SIGKILL"),
    ],
)
def test_what_happens_in_a_worker_is_told_once(how: Any, message: str, capfd: Any) -> None:
    venv = workers(how, n=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Gymnasium prints through warnings
        with pytest.raises(TrainingError, match=message):
            venv.step(np.zeros(1, int))
        venv.close()
    assert capfd.readouterr().err.count("Traceback") == 0
    assert not any(process.is_alive() for process in venv.processes)


def test_a_construction_that_fails_leaves_no_process_and_closes_what_was_made() -> None:
    here, closed = os.getpid(), []

    class OnlyHere(Still):
        def __init__(self) -> None:
            if os.getpid() != here:
                raise ValueError("no licence in this process")

        def close(self) -> None:
            closed.append(1)

    before = set(multiprocessing.active_children())
    with pytest.raises(UsageError, match="no licence in this process"):
        make_vector(OnlyHere, 3, "async")
    assert set(multiprocessing.active_children()) == before
    made = []

    class ThirdFails(OnlyHere):
        def __init__(self) -> None:
            made.append(1)
            if len(made) == 3:
                raise ValueError("no third one")

    closed.clear()
    with pytest.raises(UsageError, match="no third one"):
        make_vector(ThirdFails, 4, "sync")
    assert closed == [1, 1]


def test_workers_end_when_nobody_holds_them_any_more() -> None:
    venv = workers()
    processes = list(venv.processes)
    del venv
    gc.collect()
    assert not any(process.is_alive() for process in processes)


def test_closing_twice_is_closing_once() -> None:
    venv = workers()
    venv.close()
    venv.close()


def test_what_an_interrupted_call_left_due_is_thrown_away() -> None:
    venv = workers()
    venv.step_async(np.zeros(2, int))
    venv.parent_pipes[0].recv()  # one answer was read, one is due
    assert settled(venv)
    assert venv.step(np.zeros(2, int))[1].tolist() == [1.0, 1.0]
    os.kill(venv.processes[1].pid, signal.SIGKILL)
    venv.processes[1].join()
    assert not settled(venv)
    venv.close()


SCRIPT = """
import os, signal, sys, threading, time
sys.path.insert(0, {folder!r})
import test_workers
venv = test_workers.workers()
print(*[process.pid for process in venv.processes], flush=True)
how = {how!r}
if how == "exit": sys.exit(3)
if how == "raise": raise RuntimeError("mine")
if how == "fall": pass
if how.startswith("SIG"):
    threading.Timer(0.2, lambda: (os.killpg if how == "SIGINT" else os.kill)(os.getpid(), getattr(signal, how))).start()
    while True: venv.step([0, 0])
"""


@pytest.mark.parametrize("how", ["exit", "raise", "fall", "SIGTERM", "SIGINT", "SIGKILL"])
def test_workers_and_their_memory_go_with_the_process(how: str) -> None:
    shared = set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()
    script = SCRIPT.format(folder=str(Path(__file__).parent), how=how)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, start_new_session=True, check=False
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, pids))
    assert done.stderr.count("Traceback") == (how in ("raise", "SIGINT")), done.stderr
    left = set(os.listdir("/dev/shm")) - shared if shared or Path("/dev/shm").exists() else set()
    assert not [name for name in left if name.startswith(("pym-", "sem."))]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

"""Threads that wait for each other spin on a quiet machine, and sleep where others want the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from grouprl.machine import busy

gnu = pytest.mark.skipif(not busy._libraries(), reason="this is not Linux with GNU's OpenMP")

WAITS = """
import os, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import torch
from grouprl.machine import busy

torch.set_num_threads(2)
busy._TICK = 0.01
busy.Others.cores = lambda _: float(sys.argv[1])
x = torch.zeros(1_000_000)
with busy.sleeping_when_busy():
    for _ in range(20):
        x.add_(1)
        time.sleep(0.02)
    used = time.process_time()
    for _ in range(30):
        x.add_(1)
        time.sleep(0.02)  # the second thread of OpenMP spins for some milliseconds of these, or sleeps
    print(time.process_time() - used)
"""


def seconds_of_waiting(others: float, **env: str) -> float:
    given = {key: value for key, value in os.environ.items() if key not in busy._GIVEN}
    command = [sys.executable, "-c", WAITS, str(others)]
    return float(subprocess.run(command, env={**given, **env}, capture_output=True, check=True, text=True).stdout)


@gnu
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads need two cores to wait for each other here")
def test_threads_spin_on_a_quiet_machine_and_sleep_on_a_busy_one() -> None:
    quiet, occupied = seconds_of_waiting(0.0), seconds_of_waiting(1.0)
    assert occupied < quiet / 2, (occupied, quiet)  # processor time, not time: 30 x 3 to 20 ms beside next to nothing


@gnu
@pytest.mark.parametrize("name", busy._GIVEN)
def test_what_the_user_said_about_waiting_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in busy._GIVEN:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    with busy.sleeping_when_busy():
        assert "grouprl-busy" not in {thread.name for thread in threading.enumerate()}


@gnu
def test_teams_come_and_go_with_the_others_and_leave_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in busy._GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(busy, "_TICK", 0.002)
    others = [1.0]
    monkeypatch.setattr(busy.Others, "cores", lambda _: others[0])

    def wait_for(there: bool) -> None:
        deadline = time.monotonic() + 30
        while ("grouprl-sleepers" in {thread.name for thread in threading.enumerate()}) != there:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    torch.zeros(1_000_000).add_(1)
    tasks = len(os.listdir("/proc/self/task"))
    with busy.sleeping_when_busy(), busy.sleeping_when_busy():  # the second one does nothing
        for _ in range(5):
            others[0] = 1.0
            wait_for(True)
            others[0] = 0.0
            wait_for(False)
        others[0] = 1.0
        wait_for(True)
    assert not {"grouprl-sleepers", "grouprl-busy"} & {thread.name for thread in threading.enumerate()}
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/task")) > tasks:  # those of OpenMP leave a moment later
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_others_count_only_where_there_are_not_enough_cores_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    idle, own, clock = [0.0], [0.0], [0.0]
    monkeypatch.setattr(busy, "_idle", lambda: idle[0])
    monkeypatch.setattr(busy.time, "process_time", lambda: own[0])
    monkeypatch.setattr(busy.time, "monotonic", lambda: clock[0])
    # two seconds, in which this process used one core and a half: of two cores, or of four that were idle by half
    for cores, unused, expected in ((2, 0.0, 0.5), (4, 4.0, 0.0)):
        monkeypatch.setattr(busy.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        meter = busy.Others(lambda: 2)
        idle[0], own[0], clock[0] = idle[0] + unused, own[0] + 3.0, clock[0] + 2.0
        assert meter.cores() == expected


def test_what_the_kernel_does_not_say_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_idle", lambda: None)
    assert busy.Others(lambda: 2).cores() == 0.0


def test_a_machine_is_busy_at_once_and_quiet_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, others = [0.0], [0.0]
    monkeypatch.setattr(busy.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(busy.Others, "cores", lambda _: others[0])
    now = busy.Busy(lambda: 2)

    def looks(n: int) -> list[bool]:
        found = []
        for _ in range(n):
            clock[0] += busy._TICK
            found.append(now())
        return found

    assert looks(2) == [False, False]
    others[0] = 0.5
    assert not now()  # it has only just looked
    assert looks(1) == [True]
    others[0] = 0.1  # neither busy nor quiet
    assert looks(20) == [True] * 20
    others[0] = 0.0
    assert looks(busy._CALM) == [True] * (busy._CALM - 1) + [False]


def test_what_is_done_at_once_is_handed_over_like_what_a_thread_does() -> None:
    with busy.AtOnce() as pool:
        assert pool.submit(max, 1, 2).result() == 2
        assert pool.submit(threading.get_ident).result() == threading.get_ident()
        with pytest.raises(KeyError):
            pool.submit({}.__getitem__, 1).result()


def test_cores_are_idle_for_no_longer_than_there_are_cores_without_this_process() -> None:
    if busy._idle() is None:
        pytest.skip("there is no /proc/stat here")
    before, at, own = busy._idle(), time.monotonic(), time.process_time()
    while time.process_time() - own < 0.1:
        pass
    after, seconds = busy._idle(), time.monotonic() - at
    assert before is not None
    assert after is not None
    cores = len(os.sched_getaffinity(0))
    assert -0.02 * cores <= after - before <= seconds * cores - 0.1 + 0.02 * cores  # told in hundredths of a second

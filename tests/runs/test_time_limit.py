"""A call into other people's code comes back in time, wherever it hangs, and leaves nothing behind."""

import contextlib
import itertools
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from grouprl.runs.time_limit import within


def computes() -> None:
    for _ in itertools.count():
        pass


def waits() -> None:
    time.sleep(600)


def waits_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def waits_for_a_process() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], check=False)


def handles_errors() -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(600)


@pytest.mark.parametrize("call", [computes, waits, waits_for_a_lock, waits_for_a_process, handles_errors])
def test_a_call_in_the_main_thread_is_interrupted_wherever_it_is(call) -> None:
    threads, handler = set(threading.enumerate()), signal.getsignal(signal.SIGURG)
    with pytest.raises(TimeoutError):
        within(0.05, call)
    assert set(threading.enumerate()) <= threads
    assert signal.getsignal(signal.SIGURG) is handler


def test_a_call_that_swallows_everything_is_interrupted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from grouprl.runs import time_limit

    monkeypatch.setattr(time_limit, "_AGAIN", 0.05)
    attempts = []

    def call() -> None:
        for attempt in range(3):
            try:
                time.sleep(600)
            except BaseException:
                attempts.append(attempt)
        time.sleep(600)

    with pytest.raises(TimeoutError):
        within(0.05, call)
    assert attempts == [0, 1, 2]


def test_what_comes_in_time_is_returned_or_raised() -> None:
    threads = set(threading.enumerate())
    assert within(60, lambda: 3) == within(None, lambda: 3) == 3
    with pytest.raises(KeyError, match="mine"):
        within(60, lambda: {}["mine"])
    assert set(threading.enumerate()) <= threads


def in_a_thread(call):
    """What ``call`` returned or raised in a thread that is not the main one."""
    got = []

    def run() -> None:
        try:
            got.append(call())
        except BaseException as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return got[0]


def test_in_another_thread_the_call_is_ended_too() -> None:
    threads = set(threading.enumerate())
    assert isinstance(in_a_thread(lambda: within(0.05, computes)), TimeoutError)
    assert in_a_thread(lambda: within(60, lambda: 3)) == 3
    assert isinstance(in_a_thread(lambda: within(60, lambda: {}["mine"])), KeyError)
    assert set(threading.enumerate()) <= threads


def test_a_time_that_is_over_at_once_is_a_timeout() -> None:
    for _ in range(200):  # the interruption may come before the call begins, or while its thread is being started
        with pytest.raises(TimeoutError):
            within(1e-9, waits)


SWALLOWS = """
import os, sys, time
from grouprl.runs import time_limit
time_limit._AGAIN = 0.02

def for_ever():
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

time_limit.within(0.05, for_ever, name="reward function 'stubborn'")
"""


def test_a_call_that_swallows_everything_for_ever_ends_the_process_with_one_line() -> None:
    ended = subprocess.run([sys.executable, "-c", SWALLOWS], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: reward function 'stubborn' has gone on 10 times after its time was over")
    assert line.endswith("the newest checkpoint is whole.")


def test_a_regular_expression_that_backtracks_is_ended_although_it_keeps_pythons_lock() -> None:
    with pytest.raises(TimeoutError):
        within(0.1, lambda: re.fullmatch(r"(a+)+b", "a" * 40))  # would take hours
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    kept = signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
    try:
        assert within(5, lambda: signal.getsignal(signal.SIGVTALRM)) == signal.SIG_IGN  # somebody else's stays
    finally:
        signal.signal(signal.SIGVTALRM, kept)

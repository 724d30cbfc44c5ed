"""Waiting on a busy machine: threads that wait for each other sleep there, and spin while they have the machine alone.

OpenMP's threads meet thousands of times in a training step of a language model. A thread that is early asks again and
again for some milliseconds before it sleeps. On a quiet machine that is right: the others come within microseconds,
and to wake a thread takes tens of them. Beside another process it is wrong: the thread that is waited for may have no
core because another one spins on it, and the time that a thread spins is taken from its own fair share.

GNU's OpenMP, which PyTorch brings for Linux, decides at each wait for how long to spin. While it looks after more
threads than there are cores, it spins 100 times (3 microseconds) and not 300,000 times. So `sleeping_when_busy` keeps a
team of sleeping threads while other processes want these cores. Environment variables (OMP_WAIT_POLICY,
GOMP_SPINCOUNT) say how to wait once and for all, if they are set before PyTorch is loaded. Where one is, it holds, and
nothing is done here.

Threads of Python's own, which wait for each other at each large minibatch of an environment, sleep anyway. On a busy
machine each waits for its turn at a core, and they wait for each other. `Busy` says when it is better to do the parts
one after another in one thread.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

T = TypeVar("T")

_TICK = 0.5
"""Seconds between two looks."""
_BUSY, _QUIET = 0.2, 0.1
"""Cores that others use: from the first on the machine is busy, below the second it is quiet."""
_CALM = 4
"""Quiet looks in a row after which threads spin again."""
_GIVEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_IDLE = (3, 4)
"""Which numbers of a line of /proc/stat are time in which nobody used the core. They are measured; the others are what
a look a hundred times a second found, too coarse for half a second."""

_lock = threading.Lock()
_inside = 0


@contextmanager
def sleeping_when_busy() -> Iterator[None]:
    """Within the context, threads of OpenMP that wait for each other sleep at once whenever the machine is busy.

    It is for Linux with GNU's OpenMP. Elsewhere, within another such context, and where the user said how to wait,
    it does nothing. No result depends on it.
    """
    global _inside
    with _lock:
        _inside += 1
        first = _inside == 1
    over, thread = threading.Event(), None
    try:
        if first and not any(name in os.environ for name in _GIVEN) and (libraries := _libraries()):
            thread = threading.Thread(target=_look, args=(over, libraries), name="grouprl-busy", daemon=True)
            thread.start()
        yield
    finally:
        over.set()
        if thread is not None:
            thread.join()
        with _lock:
            _inside -= 1


def _libraries() -> list[ctypes.CDLL]:
    """GNU's OpenMP, as it is loaded in this process."""
    if not sys.platform.startswith("linux"):
        return []
    found = ThreadpoolController().select(internal_api="openmp").info()
    return [ctypes.CDLL(each["filepath"], mode=os.RTLD_NOLOAD) for each in found if each["prefix"] == "libgomp"]


def _look(over: threading.Event, libraries: list[ctypes.CDLL]) -> None:
    """Keep a team of each library while the machine is busy."""
    teams: list[_Team] = []
    busy = Busy(torch.get_num_threads)
    while not over.wait(_TICK):
        if not busy():
            _end(teams)
        elif not teams:
            teams = [_Team(library) for library in libraries]
    _end(teams)


class Busy:
    """Whether other processes want the cores that threads of this one need. It looks twice a second at most.

    Args:
        threads: how many threads this process would like to run.
    """

    def __init__(self, threads: Callable[[], int]) -> None:
        self._others, self._busy, self._calm = Others(threads), False, 0
        self._next = time.monotonic() + _TICK

    def __call__(self) -> bool:
        if (now := time.monotonic()) >= self._next:
            self._next = now + _TICK
            others = self._others.cores()
            self._calm = self._calm + 1 if others < _QUIET else 0
            self._busy = others > _BUSY or (self._busy and self._calm < _CALM)
        return self._busy


class Others:
    """How many cores other processes use of those that this one may use and would have needed."""

    def __init__(self, threads: Callable[[], int]) -> None:
        self._threads = threads
        self._idle, self._own, self._at = _idle(), time.process_time(), time.monotonic()

    def cores(self) -> float:
        """Since the last call; 0 where there are enough cores for all, and where the kernel does not say."""
        idle, own, at = _idle(), time.process_time(), time.monotonic()
        if idle is None or self._idle is None or at == self._at:
            return 0.0
        there = len(os.sched_getaffinity(0))
        others = there - ((idle - self._idle) + (own - self._own)) / (at - self._at)
        self._idle, self._own, self._at = idle, own, at
        return others if others + self._threads() > there else 0.0


class AtOnce(Executor):
    """An executor that does what it is given at once, in the thread that asks."""

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """See ``concurrent.futures.Executor``."""
        future: Future[T] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # handed over, as by a thread
            future.set_exception(error)
        return future


def _idle() -> float | None:
    """Seconds for which nobody used the cores that this process may use, added up; None where nobody says."""
    try:
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = [int(line[1 + which]) for line in lines if line[0] in mine for which in _IDLE]
    except (OSError, ValueError, IndexError, AttributeError):  # another system than Linux
        return None
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if len(ticks) == len(mine) * len(_IDLE) else None


class _Team:
    """Sleeping threads of OpenMP, as many as it takes that it looks after more threads than there are cores."""

    def __init__(self, library: ctypes.CDLL) -> None:
        size = max(2, library.omp_get_num_procs() - torch.get_num_threads() + 2)
        self._over = threading.Event()

        def sleep(_: object) -> None:
            if library.omp_get_thread_num() == 0:
                self._over.wait()  # the others wait for this one, asleep, at the end of the region

        self._region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(sleep)
        arguments = (self._region, None, ctypes.c_uint(size), ctypes.c_uint(0))
        self._thread = threading.Thread(
            target=library.GOMP_parallel, args=arguments, name="grouprl-sleepers", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """End the team: OpenMP stops counting its threads when the one that started it ends."""
        self._over.set()
        self._thread.join()


def _end(teams: list[_Team]) -> None:
    for team in teams:
        team.end()
    teams.clear()

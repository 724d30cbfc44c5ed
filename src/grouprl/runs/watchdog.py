"""Names what has been running for unusually long, such as a reward function or an environment that hangs.

A thread of its own looks twice a second at what is being called. The calls themselves cost nothing: a `Watch` is
entered around one call, or around thousands of short ones that something counts anyway.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

_TICK = 0.5
_LEAST = 2.0
"""Seconds up to which no call is long."""
_log = logging.getLogger("grouprl")


class Watch:
    """One thing that is called again and again. It is named in the log when a call takes long, and again at each
    doubling of the time.

    What is long: 100 times the median of the calls before, but between 2 and 30 seconds; and where calls usually take
    several seconds, ten times the median. Enter it around a call, from any thread::

        with watch:
            rewards = function(...)

    Args:
        name: what it is called in messages, such as "reward function 'judge'"; a function is asked when there is one.
        progress: how many calls are done, where it is entered around many of them; it is asked twice a second.
        advice: what to do, the end of the message.
    """

    def __init__(
        self, name: str | Callable[[], str], progress: Callable[[], int] | None = None, advice: str = ""
    ) -> None:
        self.name, self._progress, self._advice = name, progress, advice
        self._usual: deque[float] = deque(maxlen=100)  # seconds of a call, a number for each time it was entered
        self._said = 0.0  # the longest time that was named
        self._began = self._moved = 0.0
        self._first = self._done = 0
        self._thread = 0

    def __enter__(self) -> Watch:
        self._began = self._moved = time.monotonic()
        self._first = self._done = 0 if self._progress is None else self._progress()
        self._thread = threading.get_ident()
        _watcher.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _watcher.remove(self)
        now = time.monotonic()
        if kind is None:
            calls = 1 if self._progress is None else self._progress() - self._first
            if self._progress is None:
                self._tell(now, "took")  # a call that was long and ended between two looks
            if calls > 0:
                self._usual.append((now - self._began) / calls)

    def look(self, now: float) -> None:
        """Name it if its present call takes long; ``now`` is of ``time.monotonic``."""
        if self._progress is not None and (done := self._progress()) != self._done:
            self._done, self._moved = done, now
        self._tell(now, "has been running for")

    def _tell(self, now: float, verb: str) -> None:
        seconds = now - self._moved
        if seconds < _LEAST:
            return
        usual = statistics.median(list(self._usual)) if self._usual else self._so_far()
        if seconds < max(_long(usual), 2 * self._said):
            return
        self._said = seconds
        before = "" if usual is None else f", and usually takes {_said(usual)}"
        name = self.name if isinstance(self.name, str) else self.name()
        _log.warning("%s %s %s%s%s%s", name, verb, _said(seconds), before, self._place(), self._advice)

    def _so_far(self) -> float | None:
        """Seconds of one of the calls since it was entered, once there are a few."""
        calls = self._done - self._first
        return (self._moved - self._began) / calls if calls >= 10 else None

    def _place(self) -> str:
        """Where its thread is, if that is in a file of the user's."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None and not _of(frame, _OWN):
            if not _of(frame, _LIBRARIES):
                return f"; it is at line {frame.f_lineno} of {frame.f_code.co_filename}"
            frame = frame.f_back
        return ""


def _long(usual: float | None) -> float:
    """Seconds from which on a call takes long."""
    return 30.0 if usual is None else max(10 * usual, min(30.0, max(_LEAST, 100 * usual)))


def _said(seconds: float) -> str:
    return (
        f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s" if seconds >= 0.001 else "less than a millisecond"
    )


_OWN = (os.path.join(Path(__file__).parent.parent, ""),)
_LIBRARIES = (
    "<frozen", *(os.path.join(sysconfig.get_path(n), "") for n in ("stdlib", "platstdlib", "purelib", "platlib"))
)  # fmt: skip


def _of(frame: FrameType, places: tuple[str, ...]) -> bool:
    return frame.f_code.co_filename.startswith(places)


class _Watcher:
    """The thread that looks: started when something is entered, it ends by itself soon after nothing is any more."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._used = False

    def add(self, watch: Watch) -> None:
        with self._lock:
            self._watches.add(watch)
            self._used = True
            if self._thread is None or not self._thread.is_alive():  # a forked process has none of it
                self._thread = threading.Thread(target=self._run, name="grouprl-watch", daemon=True)
                self._thread.start()

    def remove(self, watch: Watch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def _run(self) -> None:
        while True:
            time.sleep(_TICK)
            with self._lock:
                watches = list(self._watches)
                if not watches and not self._used:
                    self._thread = None
                    return
                self._used = False
            for watch in watches:
                watch.look(time.monotonic())


_watcher = _Watcher()


def _after_fork() -> None:
    global _watcher
    _watcher = _Watcher()  # its lock may have been held, and its thread did not come along


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

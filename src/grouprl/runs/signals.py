"""Ctrl-C, SIGTERM and SIGHUP: finish the update, save, leave."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from grouprl.printing import show

Handler = Callable[[int, FrameType | None], object]

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


_stops: list[Callable[[], None]] = []
"""What each `stopping_on_signals` that was entered calls: of several around each other, a signal stops all."""

_left: list[bool] = []
"""For each `leaving_on_signals` that was entered, whether a signal has come since."""


def _leave() -> None:
    _left[:] = [True] * len(_left)
    raise KeyboardInterrupt


def leave_if_asked() -> None:
    """Raises KeyboardInterrupt once more if a library swallowed that of a signal, as destructors do."""
    if any(_left):
        raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    """Whether ``frame`` was called, directly or not, by an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within, the first signal calls ``stop`` and lets the current update end; a second one acts at once.

    Where one is entered within another, as for two runs of one agent, the first signal calls the ``stop`` of each. A
    signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        for each in dict.fromkeys([stop, *_stops]):
            each()
        show("stopping after this update; once more to stop at once", sys.stderr)
        for n in heard:
            signal.signal(n, at_once)

    def at_once(number: int, frame: FrameType | None) -> None:
        show("stopped at once; grouprl resume goes on from the last checkpoint", sys.stderr)
        _leave()

    leave_if_asked()
    with _handling(handle) as heard:
        if heard:
            _stops.append(stop)
        try:
            yield
        finally:
            if heard:
                _stops.remove(stop)


@contextmanager
def leaving_on_signals(
    said: str = "stopped; grouprl resume goes on with a run that had begun",
) -> Iterator[Callable[[], bool]]:
    """Within, a signal is ``said`` in one line and raises KeyboardInterrupt; a second one ends the process. Within
    an import the first one does.

    Yields a function that says whether one came: a library may make another error of the KeyboardInterrupt.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        for n in heard:
            signal.signal(n, signal.SIG_DFL)
        show(said, sys.stderr)
        if _is_importing(frame):  # of which libraries in C make an abort, and others an error of their own
            os._exit(130)
        _leave()

    leave_if_asked()
    _left.append(False)
    try:
        with _handling(leave) as heard:
            yield lambda: any(_left)
    finally:
        _left.pop()


@contextmanager
def _handling(handler: Handler) -> Iterator[list[int]]:
    """Within, ``handler`` hears the signals that are not ignored, which are yielded."""
    previous = {n: signal.getsignal(n) for n in _SIGNALS}
    heard = [n for n, old in previous.items() if old is not signal.SIG_IGN]
    try:
        for n in heard:
            signal.signal(n, handler)
    except ValueError:  # not in the main thread: whoever owns it handles signals
        yield []
        return
    try:
        yield heard
    finally:
        for n in heard:
            signal.signal(n, previous[n])

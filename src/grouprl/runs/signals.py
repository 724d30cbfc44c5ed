"""Ctrl-C, SIGTERM and SIGHUP: finish the update, save, leave."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from grouprl.printing import show

Handler = Callable[[int, FrameType | None], object]

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


_left: list[bool] = []
"""For each `leaving_on_signals` that was entered, whether a signal has come since."""


def _leave() -> None:
    _left[:] = [True] * len(_left)
    raise KeyboardInterrupt


def leave_if_asked() -> None:
    """Raises KeyboardInterrupt once more if a library swallowed that of a signal, as some do in their imports."""
    if any(_left):
        raise KeyboardInterrupt


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within, the first signal calls ``stop`` and lets the current update end; a second one acts at once.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        show("stopping after this update; once more to stop at once", sys.stderr)
        for n in heard:
            signal.signal(n, at_once)

    def at_once(number: int, frame: FrameType | None) -> None:
        show("stopped at once; grouprl resume goes on from the last checkpoint", sys.stderr)
        _leave()

    leave_if_asked()
    with _handling(handle) as heard:
        yield


@contextmanager
def leaving_on_signals(
    said: str = "stopped; grouprl resume goes on with a run that had begun",
) -> Iterator[Callable[[], bool]]:
    """Within, a signal is ``said`` in one line and raises KeyboardInterrupt; a second one ends the process.

    Yields a function that says whether one came: a library may make another error of the KeyboardInterrupt, as
    transformers does of what ends an import.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        for n in heard:
            signal.signal(n, signal.SIG_DFL)
        show(said, sys.stderr)
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

"""Ctrl-C and SIGTERM: finish the update, save, leave."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from grouprl.printing import show


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within, the first Ctrl-C or SIGTERM calls ``stop`` and lets the current update end; a second one acts at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        show("stopping after this update; once more to stop at once", sys.stderr)
        for n in previous:
            signal.signal(n, at_once)

    def at_once(number: int, frame: FrameType | None) -> None:
        show("stopped at once; grouprl resume goes on from the last checkpoint", sys.stderr)
        raise KeyboardInterrupt

    try:
        previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever owns it handles signals
        yield
        return
    try:
        yield
    finally:
        for n, old in previous.items():
            signal.signal(n, old)

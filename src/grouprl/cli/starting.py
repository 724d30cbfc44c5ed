"""Ctrl-C while the command line is being imported: one line, and nothing to clean up."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within, Ctrl-C ends the process without a traceback."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"stopped before anything had begun\n")
        os._exit(130)

    try:
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, end)
    except ValueError:  # imported in a thread, so by a program of someone else's
        yield
        return
    yield
    signal.signal(signal.SIGINT, before)

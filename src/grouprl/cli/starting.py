"""Ctrl-C while the command line is being imported: one line, and nothing to clean up.

It imports next to nothing itself, so that it comes as early as can be: before it there is Python's own start.
"""

from __future__ import annotations

import os
import signal


class ending_at_once:  # noqa: N801 - a context manager, which contextlib would make of a function, but later
    """Within, Ctrl-C ends the process without a traceback."""

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        try:
            if self._before is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, _end)
        except ValueError:  # imported in a thread, so by a program of someone else's
            self._before = None

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def _end(number: int, frame: object) -> None:
    os.write(2, b"stopped before anything had begun\n")
    os._exit(130)

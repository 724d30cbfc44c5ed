"""The clock of a worker: seconds of training, on the wall and of the processors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class TrainingClock:
    """Runs from its making on, and stands still while something else than training is done.

    CPU seconds are those of all threads of this process. Where a machine is busy with other work they say more of a
    method than the seconds on the wall do.
    """

    def __init__(self) -> None:
        self._began = _now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile, such as an evaluation, does not count."""
        left = _now()
        try:
            yield
        finally:
            now = _now()
            self._began = (self._began[0] + now[0] - left[0], self._began[1] + now[1] - left[1])

    @property
    def seconds(self) -> float:
        """On the wall, so far."""
        return _now()[0] - self._began[0]

    @property
    def cpu_seconds(self) -> float:
        """Of the processors, so far."""
        return _now()[1] - self._began[1]


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()

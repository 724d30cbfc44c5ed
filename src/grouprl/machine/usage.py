"""What this process takes of the machine, and how long it waits for a processor, as columns of a run's metrics."""

from __future__ import annotations

import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

_STATM = Path("/proc/self/statm")
_SCHEDSTAT = Path("/proc/self/schedstat")


class Usage:
    """Measures between two calls of :meth:`read`; a call takes about 20 microseconds."""

    def __init__(self) -> None:
        self._then, self._waited = time.perf_counter(), _seconds_waited()

    def read(self) -> dict[str, float]:
        """``memory_gb``, and ``cpu_wait`` on Linux.

        ``memory_gb`` is what the process holds in memory, in 10^9 bytes; on systems other than Linux it is the most
        that the process has held. ``cpu_wait`` is the share of the time since the last call in which the main thread
        could have run but had to wait, because other work had the processors.
        """
        found = {"memory_gb": resident_gb()}
        now, waited = time.perf_counter(), _seconds_waited()
        if waited is not None and self._waited is not None and now > self._then:
            found["cpu_wait"] = min(1.0, max(0.0, (waited - self._waited) / (now - self._then)))
        self._then, self._waited = now, waited
        return found


def resident_gb() -> float:
    """Memory that this process holds now, in 10^9 bytes; the most it has held where only that can be known."""
    with suppress(OSError, ValueError, IndexError):
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _seconds_waited() -> float | None:
    """Seconds that the main thread has waited for a processor since it began, or None where nobody counts them."""
    with suppress(OSError, ValueError, IndexError):
        return int(_SCHEDSTAT.read_bytes().split()[1]) / 1e9
    return None

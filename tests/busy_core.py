"""A core that other processes want too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grouprl.bench import launch


@contextmanager
def shared_core(others: int = 2) -> Iterator[None]:
    """Meanwhile this thread, and those that it starts, share one core with so many processes that never rest."""
    before = os.sched_getaffinity(0)
    core = min(before)
    command = [sys.executable, str(Path(launch.__file__)), str(os.getpid()), str(core)]
    spinning = [
        subprocess.Popen(
            [*command, sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
        )
        for _ in range(others)
    ]
    try:
        for process in spinning:
            assert process.stdout is not None
            process.stdout.readline()  # it spins from now on
        os.sched_setaffinity(0, {core})
        yield
    finally:
        os.sched_setaffinity(0, before)
        for process in spinning:
            process.kill()
            process.communicate()

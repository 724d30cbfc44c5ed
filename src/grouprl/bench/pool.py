"""Processes side by side, each with a core and one thread of its own, and what each of them reports.

A worker is any program. It reads one line of JSON, the cell, on its standard input, and prints lines of JSON: any
number of ``{"point": {...}}`` as it goes, then ``{"result": {...}}`` or ``{"error": "..."}``. Other lines are ignored.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from grouprl.bench.cells import Cell
from grouprl.bench.outcomes import problem
from grouprl.redaction import redact

Outcome = dict[str, Any]
"""What came of a cell: ``status`` (done or failed), ``curve``, what the worker said, and what was measured of it."""

_LAUNCH = str(Path(__file__).with_name("launch.py"))
_OURS = (sys.executable, "-m", "grouprl.bench.worker")
_PERIOD = 0.1
_TAIL = 2000
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def cores() -> list[int]:
    """The cores that this process may use; where nobody says which, their numbers."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@dataclass
class _Running:
    cell: Cell
    slot: int
    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]
    began: float
    points: list[dict[str, Any]] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)
    peak_mb: float | None = None
    cpu_seconds: float | None = None
    _rest: bytes = b""

    def listen(self) -> list[dict[str, Any]]:
        """The points reported since the last call; a result and an error are kept."""
        with suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            self.peak_mb = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
        *lines, self._rest = (self._rest + self.out.read()).split(b"\n")
        before = len(self.points)
        for line in lines:
            self._hear(line)
        return self.points[before:]

    def _hear(self, line: bytes) -> None:
        """Keep what a line says; one that is no message says nothing."""
        found = None
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("point"), dict):
            self.points.append(found["point"])
        elif isinstance(found, dict):
            self.said |= {key: found[key] for key in ("result", "error") if key in found}

    def ended(self) -> bool:
        """Whether it has; how long it had processors, with the processes that it has waited for, is known then."""
        if self.process.returncode is None:
            try:
                pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else waited for it
                return self.process.poll() is not None
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return self.process.returncode is not None

    def outcome(self) -> Outcome:
        """What came of it, once it has ended."""
        self._hear(self._rest)  # the last line may have no end
        seconds, code = time.monotonic() - self.began, self.process.returncode
        spent = {"seconds": seconds, "cpu_seconds": self.cpu_seconds, "peak_memory_mb": self.peak_mb}
        measured = {**spent, "curve": self.points}
        tail = self._tail()
        last = tail.splitlines()[-1] if tail else "it ended without a result"
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else last
        if code == 0 and isinstance(self.said.get("result"), dict) and "error" not in self.said:
            done = {**measured, **self.said["result"], "status": "done"}
            wrong = problem(done)
            if wrong is None:
                return done
            measured, ended = {**measured, "curve": []}, f"its worker gave no result that can be used: {wrong}"
        error = redact(str(self.said.get("error", ended)))
        return {"status": "failed", **measured, "error": error, "said": tail}

    def _tail(self) -> str:
        """The last of what it said on standard error, without secrets, of which none may be cut in two before."""
        self.err.seek(0)
        return redact(self.err.read()[-3 * _TAIL :].decode("utf-8", "replace"))[-_TAIL:].strip()

    def end(self) -> None:
        """Kill it with all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.out.close()
        self.err.close()


def run(
    next_cell: Callable[[], Cell | None],
    done: Callable[[Cell, Outcome], None],
    *,
    jobs: int,
    point: Callable[[Cell, dict[str, Any]], None] | None = None,
    dropped: Callable[[Cell], bool] | None = None,
) -> None:
    """Run cells until there are no more. Whatever ends it, no process stays behind.

    Args:
        next_cell: gives the next one when a place is free, or None if there is none now; it is asked again after each
            that ends.
        done: is told what came of one. point: is told of each point that a worker reports.
        jobs: how many at once.
        dropped: whether one that runs is not wanted any more; it is killed, and ``done`` is not told.
    """
    running: list[_Running] = []
    try:
        while True:
            while len(running) < jobs and (cell := next_cell()) is not None:
                running.append(_start(cell, min(set(range(jobs)) - {one.slot for one in running})))
            if not running:
                return
            time.sleep(_PERIOD)
            for one in list(running):
                ended = one.ended()
                for new in one.listen():
                    if point is not None:
                        point(one.cell, new)
                if ended or (dropped is not None and dropped(one.cell)):
                    running.remove(one)
                    outcome = one.outcome() if ended else None
                    one.end()
                    if outcome is not None:
                        done(one.cell, outcome)
    finally:
        for one in running:
            one.end()


def _start(cell: Cell, slot: int) -> _Running:
    # Our own module is found by its name, and no file of the current directory hides one of Python's.
    ours = {} if cell.worker else {"PYTHONSAFEPATH": "1"}
    mine = cores()
    launch = [sys.executable, "-I", "-S", _LAUNCH, str(os.getpid()), str(mine[slot % len(mine)])]
    err = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
    with tempfile.NamedTemporaryFile() as written:
        out = open(written.name, "rb")  # noqa: SIM115 - another end, with a place of its own
        process = subprocess.Popen(
            [*launch, *(cell.worker or _OURS)], env=os.environ | dict.fromkeys(_THREADS, "1") | ours,
            stdin=subprocess.PIPE, stdout=written, stderr=err, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as file:  # one that ends without reading says so itself
        file.write(json.dumps(cell.given()).encode() + b"\n")
    return _Running(cell, slot, process, out, err, time.monotonic())

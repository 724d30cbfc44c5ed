"""The rows of a benchmark: a file of JSON lines, one for each run that ended, that only grows."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from grouprl.bench.cells import Cell
from grouprl.bench.outcomes import problem
from grouprl.bench.pool import Outcome, cores
from grouprl.errors import DamagedFileError
from grouprl.machine.processor import described_processor, processor_name
from grouprl.redaction import without_secrets
from grouprl.runs.appended import AppendedFile
from grouprl.runs.files import read_bytes
from grouprl.runs.lock import locked
from grouprl.runs.records import read_records

Row = dict[str, Any]
"""A run: the fields of its cell, ``id``, ``status``, and if it is done ``curve``, ``greedy``, ``sampled`` and more.

A run that the file has under two names was done once: the second row has the first one's id as ``same_as``.
"""

_WHAT = "file of rows"
_NEEDED = {"id": str, "method": str, "subject": str, "arena": str, "seed": int, "steps": int, "status": str}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in its order; none if there is no file; a torn last line is left out.

    Raises DamagedFileError if it holds something else.
    """
    return list(read_records(path, _WHAT, _parse)) if os.path.lexists(path) else []


def _parse(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or not all(isinstance(row[name], kind) for name, kind in _NEEDED.items()):
            raise ValueError
    except (ValueError, KeyError, RecursionError):
        raise DamagedFileError(f"{path} is no file of rows: line {number} is no run") from None
    wrong = problem(row) if row["status"] == "done" else None
    if wrong is not None:
        raise DamagedFileError(f"{path} is no file of rows: line {number} is no run: {wrong}")
    return row


class Rows:
    """The rows of one folder, by id; the last of an id counts.

    Attributes:
        path: the file. by_id: the rows in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_id = {row["id"]: row for row in read_rows(path)}
        self._file = AppendedFile(path)
        if os.path.lexists(path):
            self._file.take_up(read_bytes(path, _WHAT))

    @classmethod
    @contextmanager
    def held(cls, folder: Path) -> Iterator[Rows]:
        """Those of a folder that this process alone writes meanwhile.

        Raises UsageError if another process does, or the folder cannot be written.
        """
        with locked(folder):
            rows = cls(folder / "rows.jsonl")
            try:
                yield rows
            finally:
                rows._file.close()

    def forget_failed(self) -> None:
        """Those of runs that failed count no more; they stay in the file."""
        self.by_id = {name: row for name, row in self.by_id.items() if row["status"] == "done"}

    def append(self, cell: Cell, outcome: Outcome, jobs: int) -> Row:
        """Write down what came of a cell, without the secrets among its settings."""
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return self._write(cell, {**outcome, "jobs": jobs, **_context(), "finished": finished})

    def append_same(self, cell: Cell, row: Row) -> Row:
        """Write down what came of a cell that does what that of ``row`` did, and say so in ``same_as``."""
        return self._write(cell, {**row, "same_as": row["id"]})

    def _write(self, cell: Cell, says: Row) -> Row:
        row: Row = without_secrets({**says, "id": cell.id, **asdict(cell), "folder": ""})  # it is of this machine
        self._file.append(json.dumps(row) + "\n")
        self.by_id[cell.id] = row
        return row


@cache
def _context() -> dict[str, Any]:
    return {"commit": commit(), "source": source(), "machine": machine()}


def machine() -> dict[str, Any]:
    """What rows were measured on."""
    name = processor_name(described_processor())
    return {"processor": name, "cores": len(cores()), "system": platform.system()}


@cache
def source() -> str:
    """A checksum of the source of grouprl that runs: two edits of one commit, or two installed versions, differ."""
    found = hashlib.sha256()
    here = Path(__file__).resolve().parents[1]
    for file in sorted(one for one in here.rglob("*") if one.suffix in _SOURCE):
        found.update(file.relative_to(here).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


_SOURCE = (".py", ".c", ".h", ".yaml")


def other_code(rows: Iterable[Row]) -> str | None:
    """A note if rows were measured with other code than runs now; older rows name the commit alone."""
    ours = commit(), source()
    found = {(row.get("commit"), row.get("source")) for row in rows}
    others = {one for one in found if one[1] != ours[1] and (one[1] or one[0] != ours[0])}
    if not others:
        return None
    named = "; ".join(sorted(_named(*one) for one in others))
    return f"note: rows of {named} count, here is {_named(*ours)}; use another --out if code may matter"


def _named(commit: str | None, source: str | None) -> str:
    return ", ".join([f"commit {commit}", *([f"source {source}"] if source else [])])


@cache
def commit() -> str | None:
    """The commit of grouprl that runs, marked if the tree differs from it; None where it is no checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return git("describe", "--always", "--dirty") if git("ls-files", "--error-unmatch", here.name) else None

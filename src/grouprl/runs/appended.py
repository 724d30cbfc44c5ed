"""Files that grow while a run goes on.

They grow by whole lines; a line that a crash tore is dropped when the file is opened again. One that is deleted or
moved meanwhile is written again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from grouprl.errors import TrainingError
from grouprl.runs.files import explain_os_error, write_bytes
from grouprl.runs.in_place import check_in_place

_log = logging.getLogger("grouprl")


class AppendedFile:
    """A text file that grows by whole lines, each handed to the operating system at once: a crash loses none.

    It knows how long it is and its checksum, so that a checkpoint can say what it held (`mark`).
    """

    def __init__(self, path: Path) -> None:
        """The file at `path`, which is opened when something is appended; if there is one already, `take_up` it."""
        self.path = path
        self._file: FileIO | None = None
        self._bytes, self._checksum = 0, xxh3_64()

    def append(self, lines: str) -> None:
        """Write `lines`, each with its end, as UTF-8; the folder is made if it is missing.

        Raises UsageError if the path cannot be written; TrainingError if the disk is full or broken, or as
        `put_right`.
        """
        self.put_right()
        data = lines.encode("utf-8", "backslashreplace")
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a+b", buffering=0)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if self._file is not None:
                with suppress(OSError):  # no torn line
                    self._file.truncate(self._bytes)
            raise explain_os_error(error, self.path) from error
        self._count(data)

    def put_right(self) -> None:
        """Look whether the file is still the one that is written: deleted or moved, it is written again, and this said.

        What lies in its place then is kept beside it.

        Raises TrainingError if it was changed, or its folder is gone, and as `replace`.
        """
        check_in_place(self.path)
        try:
            about = os.stat(self.path)
        except FileNotFoundError:
            about = None
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        if about is None and not self._bytes and self._file is None:
            return
        there = about is not None and (self._file is None or os.path.samestat(about, os.fstat(self._file.fileno())))
        if there and about is not None and about.st_size == self._bytes:
            return
        held = b"" if self._file is None or there else os.pread(self._file.fileno(), self._bytes + 1, 0)
        if there or not is_marked(held, self.mark()):
            raise TrainingError(
                f"{self.path} was changed or deleted by another program while this run was writing it. Go on from the "
                "newest checkpoint, and leave the files of a run alone until it has ended."
            )
        kept = ""
        if about is not None:
            other = self.path.with_name(f"{self.path.name}.other")
            os.replace(self.path, other)
            kept = f"; what lay in its place is {other.name} now"
        self.replace(held)
        _log.warning(
            "%s was deleted, moved or replaced while this run is writing it: it has been written again, whole%s",
            self.path, kept,
        )  # fmt: skip

    def replace(self, data: bytes) -> None:
        """Write the file anew, atomically; `append` goes on after it. Raises as `atomic_path` does."""
        self._close()
        write_bytes(self.path, data)
        self._bytes, self._checksum = 0, xxh3_64()
        self._count(data)

    def take_up(self, data: bytes) -> None:
        """Go on after `data`, which the file holds, without its last line if a crash tore that line."""
        whole = whole_lines(data)
        if whole != data:
            self.replace(whole)
            return
        self._bytes, self._checksum = 0, xxh3_64()
        self._count(data)

    def mark(self) -> dict[str, Any]:
        """What the file holds now, for a checkpoint."""
        return {"bytes": self._bytes, "xxh3_64": self._checksum.hexdigest()}

    def close(self) -> None:
        """Close the file; `append` opens it again. Raises as `put_right`."""
        if self._file is not None:
            try:
                self.put_right()
            finally:
                self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _count(self, data: bytes) -> None:
        self._bytes += len(data)
        self._checksum.update(data)


def tell_changed(path: Path, step: int) -> None:
    """Say that a file which grows with a run is not what it was when the checkpoint of `step` was written."""
    _log.warning(
        "%s is not what it was at the checkpoint of step %d: it was changed, damaged or deleted since. The run goes on "
        "as it would have, and what the file lost stays lost.", path, step,
    )  # fmt: skip


def is_marked(data: bytes, mark: Mapping[str, Any]) -> bool:
    """Whether `data` is what a file held when `AppendedFile.mark` gave `mark`."""
    return len(data) == mark["bytes"] and bool(xxh3_64(data).hexdigest() == mark["xxh3_64"])


def whole_lines(data: bytes) -> bytes:
    """`data` without what stands after the last line end: a crash tore that line."""
    return data[: data.rfind(b"\n") + 1]

"""Files of JSON lines, each of one step, that a resumed run takes back to its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from grouprl.runs.appended import AppendedFile, is_marked, tell_changed, whole_lines
from grouprl.runs.files import read_bytes, user_path

Own = TypeVar("Own", bound="RecordLog")
Record = TypeVar("Record")


def read_records(
    path: str | os.PathLike[str], what: str, parse: Callable[[Path, int, bytes], Record]
) -> Iterator[Record]:
    """The records in a file of JSON lines, in its order; a torn last line is left out.

    Args:
        path: the file. what: what messages call it.
        parse: makes a record of the path, the number of a line and its bytes. Raises UsageError if it is none.

    Raises UsageError if the file is missing or holds something else.
    """
    path = user_path(path)
    for number, line in enumerate(whole_lines(read_bytes(path, what)).splitlines(), start=1):
        yield parse(path, number, line)


class RecordLog:
    """Appends to a file of JSON lines; opens one that exists and goes on after its last whole line.

    Args:
        path: the file, which need not exist yet.
        what: what messages call it.
        step_of: the step of a line, given the path, the number of the line and its bytes. Raises UsageError if the line
            is none of this kind.

    Raises UsageError if the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], what: str, step_of: Callable[[Path, int, bytes], int]) -> None:
        self.path, self._what, self._step_of = user_path(path), what, step_of
        self._file = AppendedFile(self.path)
        if os.path.lexists(self.path):
            self._file.take_up(read_bytes(self.path, what))

    def append_lines(self, lines: Iterable[str]) -> None:
        """Write lines of JSON and hand them to the operating system, so that a crash loses none."""
        self._file.append("".join(line + "\n" for line in lines))

    def mark(self) -> dict[str, Any]:
        """What the file holds now, for a checkpoint: `resume` goes back to it."""
        return self._file.mark()

    def resume(self, step: int, mark: Mapping[str, Any] | None) -> None:
        """Go back to what the file was at the checkpoint of `step`, which holds `mark`; None: there was no file then.

        If the file does not begin with that any more, this is said. Then, and without a mark, the lines of later steps
        are dropped.
        """
        if mark is not None:
            if self._cut_back(mark):
                return
            tell_changed(self.path, step)
        self.truncate_after(step)

    def _cut_back(self, mark: Mapping[str, Any]) -> bool:
        data = read_bytes(self.path, self._what) if self.path.exists() else b""
        begin = data[: mark["bytes"]]
        if not is_marked(begin, mark):
            return False
        if len(begin) < len(data):
            self._file.replace(begin)
        return True

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps: those of a run that resumes from a checkpoint of `step`."""
        if not self.path.exists():
            return
        lines = read_bytes(self.path, self._what).splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if self._step_of(self.path, number, line) <= step]
        if len(kept) < len(lines):
            self._file.replace(b"".join(kept))

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        self._file.close()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

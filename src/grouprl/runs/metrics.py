"""The metrics of a run: a CSV file, one row per update, that two identical runs write identically."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

from grouprl.errors import UsageError
from grouprl.runs.appended import AppendedFile, is_marked, tell_changed, whole_lines
from grouprl.runs.files import read_bytes, user_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MetricRow = Mapping[str, float | int | None]

_WHAT = "metrics file"

_ROUNDING = 1e-9


def reached(value: float, goal: float) -> bool:
    """Whether a mean is at least ``goal``, up to the rounding of its sum: three times 0.3 reach 0.9. NaN never does."""
    return value >= goal - _ROUNDING * abs(goal)


class MetricsLog:
    """Appends rows to a CSV file; opens one that exists and goes on from its last whole row.

    The columns are those of the first row, in its order. A key that comes later adds a column, blank in older rows.
    Every row is flushed to the operating system, so a crash of the process loses none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create `path`. Raises UsageError if it is no CSV file of ours or cannot be written."""
        self.path = user_path(path)
        self._file = AppendedFile(self.path)
        self._columns: list[str] = []
        self._n_rows = 0
        if os.path.lexists(self.path):
            data = read_bytes(self.path, _WHAT)
            self._columns, rows = _parse(self.path, whole_lines(data))
            self._n_rows = len(rows)
            self._file.take_up(data)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the file, empty before the first row."""
        return tuple(self._columns)

    def append(self, row: MetricRow) -> None:
        """Write one row. None and missing keys are blank; floats are written so that they read back exactly."""
        new = [key for key in row if key not in self._columns]
        if new:
            self._file.put_right()
            self._rewrite([*self._columns, *new], self._rows())
        self._file.append(_to_csv([[_format(row.get(column)) for column in self._columns]]))
        self._n_rows += 1

    def mark(self) -> dict[str, Any]:
        """What the file holds now, for a checkpoint: `resume` goes back to it."""
        return {"columns": len(self._columns), "rows": self._n_rows, **self._file.mark()}

    def resume(self, step: int, mark: Mapping[str, Any]) -> bool:
        """Go back to what the file was at the checkpoint of `step`, which holds `mark`.

        If the file does not begin with that any more, this is said and rows of later steps are dropped. Returns whether
        it does.
        """
        if self._cut_back(mark):
            return True
        tell_changed(self.path, step)
        self.truncate_after("step", step)
        return False

    def _cut_back(self, mark: Mapping[str, Any]) -> bool:
        rows = [row[: mark["columns"]] for row in self._rows()[: mark["rows"]]]
        columns = self._columns[: mark["columns"]]
        data = _to_csv([columns, *rows]).encode() if columns else b""
        if not is_marked(data, mark):
            return False
        if len(data) < self._file.mark()["bytes"]:
            self._rewrite(columns, rows)
        return True

    def truncate_after(self, key: str, value: float) -> None:
        """Drop the rows whose `key` exceeds `value`; a blank never does. A log without rows has nothing to drop.

        Raises UsageError if there is no column `key`.
        """
        if not self._columns:
            return
        if key not in self._columns:
            raise UsageError(f"{self.path} has no column {key!r}; it has {', '.join(self._columns)}.")
        index = self._columns.index(key)
        rows = self._rows()
        kept = [row for row in rows if not _to_float(row[index], self.path) > value]
        if len(kept) < len(rows):
            self._rewrite(self._columns, kept)

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows(self) -> list[list[str]]:
        return _parse(self.path, read_bytes(self.path, _WHAT))[1] if self._columns else []

    def _rewrite(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        blank = [""] * len(columns)
        table = [columns, *([*row, *blank][: len(columns)] for row in rows)]
        text = _to_csv(table) if columns else ""
        self._file.replace(text.encode())
        self._columns, self._n_rows = list(columns), len(table) - 1


def read_metrics(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float64]]:
    """The columns of a metrics file as arrays [rows], blanks as NaN; a torn last line is left out.

    Raises UsageError if the file is missing or not a metrics file.
    """
    import numpy as np

    path = user_path(path)
    columns, rows = _parse(path, whole_lines(read_bytes(path, _WHAT)))
    values = np.array([[_to_float(cell, path) for cell in row] for row in rows], dtype=np.float64)
    return {column: values[:, i].copy() if rows else np.empty(0) for i, column in enumerate(columns)}


def _format(value: SupportsFloat | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _to_float(cell: str, path: Path) -> float:
    try:
        return float(cell) if cell else float("nan")
    except ValueError as error:
        raise UsageError(f"{path} is not a metrics file: {cell!r} is not a number.") from error


def _to_csv(rows: Iterable[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _parse(path: Path, data: bytes) -> tuple[list[str], list[list[str]]]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a metrics file: it is not text.") from error
    lines = list(csv.reader(io.StringIO(text, newline="")))
    if not lines:
        return [], []
    columns, rows = lines[0], lines[1:]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns):
            raise UsageError(
                f"{path} is not a metrics file or is damaged: line {number} has {len(row)} values "
                f"for {len(columns)} columns."
            )
    return columns, rows

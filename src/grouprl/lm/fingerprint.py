"""Short fingerprints of data, by which a checkpoint knows again what it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

PROMPT = "prompt"


def digest(value: Any) -> str:
    """A fingerprint of plain values, in 16 hexadecimal digits: equal for equal values, in any process."""
    return hashlib.sha256(_encoded(value)).hexdigest()[:16]


class RowsDigest:
    """Fingerprints of rows one after another: of their prompts, and of the other columns, which rewards may read."""

    def __init__(self) -> None:
        self.rows = 0
        self._prompts, self._columns = hashlib.sha256(), hashlib.sha256()

    def add(self, row: Any) -> None:
        """Take one more row; what is no mapping counts as a prompt."""
        prompt, columns = row, {}
        if isinstance(row, Mapping):
            prompt, columns = row.get(PROMPT), {key: value for key, value in row.items() if key != PROMPT}
        self._prompts.update(_encoded(prompt) + b"\n")
        self._columns.update(_encoded(columns) + b"\n")
        self.rows += 1

    def state(self) -> dict[str, Any]:
        """The number of rows and the two fingerprints."""
        return {
            "rows": self.rows, "prompts": self._prompts.hexdigest()[:16], "columns": self._columns.hexdigest()[:16],
        }  # fmt: skip


def _encoded(value: Any) -> bytes:
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """Values that JSON knows. None in a mapping counts as absent, as Arrow fills it in; objects count by their type."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(inner) for inner in value), key=repr)
    if hasattr(value, "tolist"):  # arrays of any library
        return _plain(value.tolist())
    return type(value).__name__

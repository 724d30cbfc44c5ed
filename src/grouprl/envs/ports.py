"""What an export left, and the arrays that an exported policy takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Port:
    """One array that an exported policy takes or gives: its name, its shape without the batch, its type in NumPy."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """As policy.json has it."""
        return {"name": self.name, "shape": ["batch", *self.shape], "dtype": self.dtype}


@dataclass(frozen=True)
class Exported:
    """What :func:`export_policy` left.

    Attributes:
        folder: where it is. file: the policy in it.
        inputs, outputs: arrays, each with a batch axis before ``shape``.
        checked: what it was compared in, and with how many observations. difference: the largest that was found.
        notes: for a person to read.
    """

    folder: Path
    file: Path
    inputs: list[Port]
    outputs: list[Port]
    checked: str
    difference: float
    notes: list[str]

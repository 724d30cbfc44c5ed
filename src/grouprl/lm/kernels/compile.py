"""The compiled C functions for language models."""

from __future__ import annotations

import ctypes
from pathlib import Path

from grouprl.machine.compile import Kernels, UnavailableError

__all__ = ["UnavailableError", "available", "functions", "kernels"]

kernels = Kernels(
    Path(__file__).resolve().parent,
    ("decode.c", "linear.c", "attention.c", "gradient.c", "head.c", "layer.c"),
    ("products.h", "linear.h", "panels.h"),
    (("-fopenmp",), ("-fopenmp", "-mno-amx-tile")),  # without AMX tiles if the system refuses them
    lambda loaded: loaded.grouprl_start() == 0,
)


def functions() -> ctypes.CDLL:
    """Return the compiled functions. Raises UnavailableError if there are none on this machine."""
    return kernels.functions()


def available() -> bool:
    """Whether there are compiled functions on this machine."""
    return kernels.available

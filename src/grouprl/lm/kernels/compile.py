"""The compiled functions of the language-model arena."""

from __future__ import annotations

import ctypes
from pathlib import Path

from grouprl.machine.compile import Kernels, UnavailableError

__all__ = ["UnavailableError", "available", "functions", "kernels"]

kernels = Kernels(
    Path(__file__).resolve().parent,
    ("decode.c", "linear.c", "attention.c", "gradient.c", "head.c", "layer.c"),
    ("products.h", "linear.h", "panels.h"),
    (("-fopenmp",), ("-fopenmp", "-mno-amx-tile")),  # the matrix unit has to be granted by the system
    lambda loaded: loaded.grouprl_start() == 0,
)


def functions() -> ctypes.CDLL:
    """The compiled functions; raises UnavailableError where there are none."""
    return kernels.functions()


def available() -> bool:
    """Whether :func:`functions` gives one."""
    return kernels.available

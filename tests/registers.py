"""Compiled code as processors with narrower registers have it, on one that has wider ones."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

import pytest

from grouprl.machine.compile import _FLAGS, Kernels
from grouprl.machine.compiler import Compiler

WITHOUT = {
    "16 floats": (),
    "8 floats": ("-mno-avx512f", "-mno-amx-tile"),
    "4 floats": ("-mno-avx", "-mno-amx-tile"),
}
"""What is switched off, by the floats that a register then holds at most."""


def use(monkeypatch: pytest.MonkeyPatch, kernels: Kernels, floats: str, *flags: str) -> None:
    """Compiled functions for such registers in the place of this processor's own; skips on other processors."""
    if not WITHOUT[floats]:
        return
    if platform.machine() != "x86_64":
        pytest.skip("registers of another processor")
    monkeypatch.setattr(kernels, "_found", _compiled(kernels, (*flags, *WITHOUT[floats])))


@cache
def _compiled(kernels: Kernels, flags: tuple[str, ...]) -> ctypes.CDLL:
    return kernels._built(Compiler.of_the_system(), (*_FLAGS, *flags))

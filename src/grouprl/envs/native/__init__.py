"""The compiled functions of this arena: one library, so that a run has all of them or, and says so, none."""

from __future__ import annotations

from pathlib import Path

from grouprl.machine.compile import Kernels

kernels = Kernels(Path(__file__).resolve().parent, ("network.c", "objective.c", "adam.c"), ("layers.h",))

"""Trainings of two processes beside that of one: what "the same" means."""

from __future__ import annotations

import math
from typing import Any

import torch

Found = dict[str, Any]
"""What a training gave: "gradients" as they were taken, "weights" at its end by name, and its "log"."""


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two weights of one name."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)


def check_learned_alike(alone: Found, first: Found, second: Found) -> None:
    """The first gradient up to rounding, weights that hardly differ, and none between the two; the same log."""
    own = alone["gradients"][0]
    assert float((first["gradients"][0] - own).norm()) <= 1e-6 * float(own.norm())
    assert len(first["gradients"]) == len(alone["gradients"])
    assert furthest(first["weights"], second["weights"]) == 0
    assert furthest(first["weights"], alone["weights"]) < 1e-5
    for ours, theirs, others in zip(alone["log"], first["log"], second["log"], strict=True):
        assert ours.keys() == theirs.keys() == others.keys()
        for key, value in ours.items():
            if "runtime" not in key:
                assert theirs[key] == others[key], key
                assert math.isclose(value, theirs[key], rel_tol=1e-4, abs_tol=2e-5), key

"""The softmax over the vocabulary by compiled code."""

from __future__ import annotations

from ctypes import c_float, c_void_p

import torch
from torch import Tensor

from grouprl.lm.native.compile import available, functions


def supported(z: Tensor) -> bool:
    """Whether :func:`softmax` can do it."""
    return z.device.type == "cpu" and z.dtype in (torch.float32, torch.bfloat16) and available()


def softmax(z: Tensor, targets: Tensor, temperature: float, *, learning: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits ``z [m, V]``: log-probability of ``targets [m]``, entropy, probability of all others; ``[m]`` float32.

    With ``learning``, ``z`` becomes the probabilities, that of the target 0.
    """
    out = [torch.empty(len(z), dtype=torch.float32) for _ in range(3)]
    z, targets = z.contiguous(), targets.contiguous()
    functions().grouprl_softmax(
        int(z.dtype == torch.bfloat16), *z.shape, c_void_p(z.data_ptr()), c_float(1.0 / temperature),
        c_void_p(targets.data_ptr()), int(learning), *(c_void_p(x.data_ptr()) for x in out),
    )  # fmt: skip
    return out[0], out[1], out[2]

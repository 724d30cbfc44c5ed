"""The language-model head by compiled code: logits, the softmax over them, and the gradient through both."""

from __future__ import annotations

from ctypes import c_float, c_void_p

import torch
from torch import Tensor

from grouprl.lm.kernels.compile import available, functions
from grouprl.lm.kernels.linear import BLOCK, Linear, preferred

_SLAB = 4096
"""Tokens of the vocabulary whose weights are laid out at once: few enough to stay in the processor's cache."""


def can_do_softmax(z: Tensor) -> bool:
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


def can_do_logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`logits` and :func:`logits_gradient` are there for these, and better than torch's products."""
    fits = h.dtype == torch.bfloat16 and not any(n % (2 * BLOCK) for n in weight.shape)
    return fits and bias is None and h.device.type == weight.device.type == "cpu" and preferred()


def logits(h: Tensor, weight: Tensor) -> Tensor:
    """``h weight^T``, ``[m, V]`` bfloat16, for ``h [m, d]`` bfloat16 and ``weight [V, d]``, rounded on the way."""
    z = h.new_empty(len(h), len(weight))
    for part, to in zip(torch.split(weight, _SLAB), torch.split(z, _SLAB, 1), strict=True):
        Linear([part], low=True).into(to, h)
    return z


def logits_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """``g weight``, ``[m, d]`` float32: the gradient of ``h`` from that of :func:`logits`."""
    dh = torch.zeros(len(g), weight.shape[1], dtype=torch.float32)
    for part, of in zip(torch.split(weight, _SLAB), torch.split(g, _SLAB, 1), strict=True):
        Linear.backwards([part]).into(dh, of, add=True)
    return dh

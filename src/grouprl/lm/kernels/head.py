"""The language-model head with compiled code: logits, softmax, and the gradient of the hidden states."""

from __future__ import annotations

from ctypes import c_float, c_void_p

import torch
from torch import Tensor

from grouprl.lm.kernels.compile import available, functions
from grouprl.lm.kernels.linear import BLOCK, Linear, preferred

_SLAB = 4096
"""The number of vocabulary entries whose weights are laid out at once. They stay in the processor's cache."""


def can_do_softmax(z: Tensor) -> bool:
    """Whether :func:`softmax` supports the logits ``z``: float32 or bfloat16 on a CPU with compiled code."""
    return z.device.type == "cpu" and z.dtype in (torch.float32, torch.bfloat16) and available()


def softmax(z: Tensor, targets: Tensor, temperature: float, *, learning: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the softmax over the vocabulary of logits / temperature.

    Args:
        z: ``[m, V]`` logits. With ``learning``, the probabilities overwrite them, with 0 for the targets.
        targets: ``[m]`` int64 token ids.
        temperature: a positive number that divides the logits.
        learning: whether to write the probabilities.

    Returns:
        Log-probabilities of the targets in nats, entropies in nats, and the total probability of all other tokens. Each
        is ``[m]`` float32.

    Raises:
        UnavailableError: there is no compiled code.
    """
    out = [torch.empty(len(z), dtype=torch.float32) for _ in range(3)]
    z, targets = z.contiguous(), targets.contiguous()
    functions().grouprl_softmax(
        int(z.dtype == torch.bfloat16), *z.shape, c_void_p(z.data_ptr()), c_float(1.0 / temperature),
        c_void_p(targets.data_ptr()), int(learning), *(c_void_p(x.data_ptr()) for x in out),
    )  # fmt: skip
    return out[0], out[1], out[2]


def can_do_logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`logits` and :func:`logits_gradient` support these tensors and are faster than torch.

    Args:
        h: ``[m, d]``, must be bfloat16 on a CPU.
        weight: ``[V, d]`` on a CPU. Both sizes must be multiples of 32.
        bias: must be None.
    """
    fits = h.dtype == torch.bfloat16 and not any(n % (2 * BLOCK) for n in weight.shape)
    return fits and bias is None and h.device.type == weight.device.type == "cpu" and preferred()


def logits(h: Tensor, weight: Tensor) -> Tensor:
    """Compute the logits ``h weight^T``.

    Args:
        h: ``[m, d]`` bfloat16.
        weight: ``[V, d]``. The function rounds it to bfloat16.

    Returns:
        Logits ``[m, V]`` bfloat16.
    """
    z = h.new_empty(len(h), len(weight))
    for part, to in zip(torch.split(weight, _SLAB), torch.split(z, _SLAB, 1), strict=True):
        Linear([part], low=True).into(to, h)
    return z


def logits_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """Compute ``g weight``, the gradient of ``h`` in :func:`logits`.

    Args:
        g: ``[m, V]`` bfloat16, the gradient of the logits.
        weight: ``[V, d]``. The function rounds it to bfloat16.

    Returns:
        The gradient ``[m, d]`` float32.
    """
    dh = torch.zeros(len(g), weight.shape[1], dtype=torch.float32)
    for part, of_part in zip(torch.split(weight, _SLAB), torch.split(g, _SLAB, 1), strict=True):
        Linear.backwards([part]).into(dh, of_part, add=True)
    return dh

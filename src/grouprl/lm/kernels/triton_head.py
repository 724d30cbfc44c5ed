"""The choice between Triton's softmax and torch's softmax for the language-model head on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module, util

import torch
from torch import Tensor

Softmax = Callable[..., tuple[Tensor, Tensor, Tensor]]

_log = logging.getLogger("grouprl")


@cache
def softmax_there(device: torch.device, dtype: torch.dtype, plain: Softmax) -> Softmax | None:
    """Return Triton's softmax if it works on ``device`` and agrees with the torch function, else None.

    The function compares both on a small tensor of random logits. It logs a warning if Triton's softmax fails or gives
    other numbers.

    Args:
        device: the device of the logits.
        dtype: the dtype of the logits.
        plain: the softmax in torch operations.
    """
    if device.type != "cuda" or util.find_spec("triton") is None:
        return None
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(4, 5000, generator=generator)).to(device, dtype)
    targets = torch.tensor([0, 7, 4999, 4096], device=device)
    copies = z.clone(), z.clone()
    try:
        kernel: Softmax = import_module("grouprl.lm.kernels.triton_kernels").softmax
        by_kernel = kernel(copies[0], targets, 0.8, learning=True)
    except Exception as error:  # Triton raises many types of errors
        _log.warning("learning is slower than it could be: Triton's kernels cannot be used: %s", error)
        return None
    by_torch = plain(copies[1], targets, 0.8, True)
    exact = all(float((a - b).abs().max()) < 1e-4 for a, b in zip(by_kernel, by_torch, strict=True))
    close = float((copies[0].float() - copies[1].float()).norm()) < 0.01 * float(copies[1].float().norm())
    if exact and close:
        return kernel
    _log.warning("learning is slower than it could be: Triton's softmax gives other numbers than torch's")
    return None

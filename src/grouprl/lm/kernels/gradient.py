"""Gradients of weights by compiled code: bfloat16 products, summed in float32 where the gradient stands."""

from __future__ import annotations

from ctypes import c_void_p

import torch
from torch import Tensor

from grouprl.lm.kernels.compile import available, functions

_W = 16


def can_add_weight_gradient(to: Tensor, g: Tensor, x: Tensor) -> bool:
    """Whether :func:`weight_gradient` can do it."""
    return (
        to.device.type == "cpu" and to.dtype == torch.float32 and to.is_contiguous()
        and g.dtype == x.dtype == torch.bfloat16 and not to.shape[0] % _W and not to.shape[1] % _W and available()
    )  # fmt: skip


def weight_gradient(to: Tensor, g: Tensor, x: Tensor, *, add: bool) -> None:
    """``to [out, in]`` float32 = (``add``: +=) ``g^T x`` for ``g [n, out]``, ``x [n, in]`` bfloat16."""
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (g, x))
    if functions().grouprl_weight_gradient(
        g.shape[0], g.shape[1], x.shape[1], c_void_p(g.data_ptr()), g.stride(0), c_void_p(x.data_ptr()), x.stride(0),
        c_void_p(to.data_ptr()), int(add),
    ):  # fmt: skip
        raise MemoryError(f"no memory for the gradient of a weight of {tuple(to.shape)}")

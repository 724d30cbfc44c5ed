"""Gradients of weights with compiled code. Products are in bfloat16, and sums go to the float32 gradient in place."""

from __future__ import annotations

from ctypes import c_void_p

import torch
from torch import Tensor

from grouprl.lm.kernels.compile import available, functions

_W = 16


def can_add_weight_gradient(to: Tensor, g: Tensor, x: Tensor) -> bool:
    """Whether :func:`weight_gradient` supports these tensors.

    Args:
        to: ``[out, in]``, must be contiguous float32 on a CPU. Both sizes must be multiples of 16.
        g: ``[n, out]``, must be bfloat16.
        x: ``[n, in]``, must be bfloat16.
    """
    return (
        to.device.type == "cpu" and to.dtype == torch.float32 and to.is_contiguous()
        and g.dtype == x.dtype == torch.bfloat16 and not to.shape[0] % _W and not to.shape[1] % _W and available()
    )  # fmt: skip


def weight_gradient(to: Tensor, g: Tensor, x: Tensor, *, add: bool) -> None:
    """Compute ``g^T x`` into ``to``.

    Args:
        to: ``[out, in]`` float32.
        g: ``[n, out]`` bfloat16, the gradient of a layer's outputs.
        x: ``[n, in]`` bfloat16, the inputs of the layer.
        add: whether to add the product to ``to``. Otherwise the product overwrites ``to``.

    Raises:
        UnavailableError: there is no compiled code.
        MemoryError: there is not enough memory.
    """
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (g, x))
    if functions().grouprl_weight_gradient(
        g.shape[0], g.shape[1], x.shape[1], c_void_p(g.data_ptr()), g.stride(0), c_void_p(x.data_ptr()), x.stride(0),
        c_void_p(to.data_ptr()), int(add),
    ):  # fmt: skip
        raise MemoryError(f"no memory for the gradient of a weight of {tuple(to.shape)}")

"""Compiled attention over packed groups on a CPU, and its gradient."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouprl.lm.kernels.compile import functions

_W = 16


class Stretches(NamedTuple):
    """The ranges ("stretches") of the prompts and completions in a packed row. All tensors are int32 on the CPU.

    The T stretches are in the order of the groups. The first stretch of a group is its prompt, the others are its
    completions.

    Attributes:
        starts: ``[T]``, the index of the first token of each stretch in the row.
        counts: ``[T]``, the number of tokens of each stretch.
        groups: ``[P + 1]``, the index of each group's first stretch, and T at the end.
    """

    starts: Tensor
    counts: Tensor
    groups: Tensor


class _Attention(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("heads", "k_heads", "d", "low", "out_low", "groups", "window", "ld_q", "ld_k")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("group", "start", "count", "q", "k", "v", "dout", "out", "dq", "dk", "dv")),
    ]  # fmt: skip


def can_attend(q: Tensor, dtype: torch.dtype, softcap: float | None) -> bool:
    """Whether :func:`attend` supports these settings.

    It needs tensors on a CPU, float32 or bfloat16 products, a head size that is a multiple of 16, and no soft cap.

    Args:
        q: ``[S, H, D]``.
        dtype: the dtype of matrix products.
        softcap: the soft cap of the scores, or None.
    """
    return (
        q.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and softcap is None and not q.shape[2] % _W
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, stretches: Stretches, scale: float, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Compute attention over packed groups. The result is differentiable.

    Args:
        q: ``[S, H, D]`` queries.
        k: ``[S, K, D]`` keys.
        v: ``[S, K, D]`` values.
        stretches: the ranges of the prompts and completions in the row.
        scale: the factor of the scores.
        window: the number of tokens that a token sees, itself included, or None.
        dtype: the dtype of matrix products. The softmax runs in float32.

    Returns:
        The attended values ``[S, H, D]`` float32.

    Raises:
        UnavailableError: there is no compiled code.
    """
    out: Tensor = _Attend.apply(q, k, v, stretches, scale, window, dtype)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stretches: Stretches,
        scale: float,
        window: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        low = [x.detach().to(dtype).contiguous() for x in (q, k, v)]
        ctx.save_for_backward(*low)
        ctx.stretches, ctx.scale, ctx.window, ctx.dtypes = stretches, scale, window, (q.dtype, k.dtype, v.dtype)
        out = torch.empty(q.shape, dtype=torch.float32)
        attention(low[0], low[1], low[2], stretches, scale, window, {"out": out})
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        gradients = {
            name: torch.empty(x.shape, dtype=torch.float32)
            for name, x in zip(("dq", "dk", "dv"), (q, k, v), strict=True)
        }
        attention(q, k, v, ctx.stretches, ctx.scale, ctx.window, gradients, gradient.to(q.dtype).contiguous())
        return *(x.to(dtype) for x, dtype in zip(gradients.values(), ctx.dtypes, strict=True)), None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, stretches: Stretches, scale: float, window: int | None, outputs: dict[str, Tensor],
    gradient: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute attention over packed groups, or its gradient, into existing tensors.

    The heads of a token must be contiguous. Tokens may have any stride, but q and dq must have the same one, and k, v,
    dk and dv must have the same one.

    Args:
        q: ``[S, H, D]`` queries, float32 or bfloat16.
        k: ``[S, K, D]`` keys, of the dtype of q.
        v: ``[S, K, D]`` values, of the dtype of q.
        stretches: the ranges of the prompts and completions in the row.
        scale: the factor of the scores.
        window: the number of tokens that a token sees, itself included, or None.
        outputs: the tensors to write, by name. Without ``gradient`` it is ``out [S, H, D]``, float32 or of the dtype of
            q. With ``gradient`` they are ``dq [S, H, D]``, ``dk [S, K, D]`` and ``dv [S, K, D]`` in float32.
        gradient: ``[S, H, D]``, the gradient of the attended values, of the dtype of q, or None.

    Raises:
        UnavailableError: there is no compiled code.
        MemoryError: there is not enough memory.
    """
    starts, counts, groups = stretches
    low = q.dtype == torch.bfloat16
    struct = _Attention(
        q.shape[1], k.shape[1], q.shape[2], low, "out" in outputs and outputs["out"].dtype == torch.bfloat16,
        len(groups) - 1, window or 0, q.stride(0), k.stride(0), scale,
        *(x.data_ptr() for x in (groups, starts, counts, q, k, v)), None if gradient is None else gradient.data_ptr(),
        **{name: x.data_ptr() for name, x in outputs.items()},
    )  # fmt: skip
    if functions().grouprl_attention(ctypes.byref(struct), int(gradient is not None)):
        raise MemoryError(f"no memory for attention over {q.shape[0]} tokens")

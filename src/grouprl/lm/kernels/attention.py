"""Compiled attention over packed groups on a CPU, and its gradient: what :class:`PackedAttention` does in torch."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouprl.lm.kernels.compile import functions

_W = 16


class Stretches(NamedTuple):
    """Where the tokens of packed groups lie in a row; each int32, on the CPU.

    Attributes:
        starts, counts: ``[T]`` first token and number of tokens of each stretch: of a group first its prompt, then its
            completions.
        groups: ``[P + 1]`` where each group's stretches begin.
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
    """Whether :func:`attend` can do it: on a CPU, without a soft cap, heads of a multiple of 16."""
    return (
        q.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and softcap is None and not q.shape[2] % _W
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, stretches: Stretches, scale: float, window: int | None, dtype: torch.dtype
) -> Tensor:
    """``q [S, H, D]``, ``k, v [S, K, D]`` -> ``[S, H, D]`` float32; products in ``dtype``, softmax in float32.

    Raises UnavailableError where there is no compiled code.
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
        made = {
            name: torch.empty(x.shape, dtype=torch.float32)
            for name, x in zip(("dq", "dk", "dv"), (q, k, v), strict=True)
        }
        attention(q, k, v, ctx.stretches, ctx.scale, ctx.window, made, gradient.to(q.dtype).contiguous())
        return *(x.to(dtype) for x, dtype in zip(made.values(), ctx.dtypes, strict=True)), None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, stretches: Stretches, scale: float, window: int | None, outputs: dict[str, Tensor],
    gradient: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention from ``q [S, H, D]``, ``k, v [S, K, D]`` into ``outputs``: ``out [S, H, D]``, float32 or as q; or, with
    the ``gradient [S, H, D]`` of that, ``dq, dk, dv`` in float32.

    Heads are contiguous; tokens may lie apart, the same in q and dq, and in k, v, dk and dv.
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

"""Triton kernels for a Llama-shaped layer on a GPU, apart from its matrix products.

There are kernels for norms, rotary positions and gates. This module also exports the kernels for attention of a decode
step and for the softmax over the vocabulary.

The functions with ``@triton.jit`` are written in Triton's language. Triton compiles them for the GPU at their first
call.

Shapes use these letters: B tokens, H query heads and K key heads of size D.
:class:`grouprl.lm.packed.decode_attention.DecodeAttention` describes how keys and values are stored.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouprl.lm.kernels.triton_attention import attend as attend
from grouprl.lm.kernels.triton_softmax import softmax as softmax

_PROGRAMS = 1024
"""The most partial sums for the gradient of a norm's weight."""


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, to: Tensor | None = None
) -> Tensor:
    """Add ``y`` to ``x`` and compute the RMSNorm of the sum, times ``weight``.

    Args:
        x: ``[B, d]`` float32.
        y: ``[B, d]``, or None to compute the norm of ``x``.
        weight: ``[d]`` float32.
        eps: the epsilon of the norm.
        dtype: the dtype of the result.
        to: ``[B, d]`` float32, receives the sum. With None the sum overwrites ``x``. Without ``y`` nothing is written.

    Returns:
        The norm ``[B, d]`` in ``dtype``.
    """
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    y, total, adding = (x if y is None else y), (x if to is None else to), y is not None
    _add_norm[(rows,)](x, y, total, weight, out, width, eps, adding, **_block(width))
    return out


@triton.jit
def _add_norm(x, y, total, weight, out, width, eps, ADDING: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    place = tl.program_id(0).to(tl.int64) * width + at
    value = tl.load(x + place, mask=inside, other=0.0)
    if ADDING:
        value += tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + place, value, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    normed = value * scale * tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


def norm_gradient(
    x: Tensor, dh: Tensor, weight: Tensor, eps: float, g: Tensor, g_low: Tensor, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient of an RMSNorm.

    Args:
        x: ``[B, d]`` float32, the input of the norm.
        dh: ``[B, d]``, the gradient of the result of the norm.
        weight: ``[d]`` float32.
        eps: the epsilon of the norm.
        g: ``[B, d]`` float32. The function adds the gradient of ``x`` to it.
        g_low: ``[B, d]``. The function writes the new ``g`` to it in its dtype.
        learned: whether to compute the gradient of ``weight``.

    Returns:
        The norm ``[B, d]`` in the dtype of ``dh``, and the gradient of ``weight`` ``[d]`` float32 or None.
    """
    rows, width = x.shape
    out, programs = torch.empty_like(dh), min(rows, _PROGRAMS)
    weight_gradient = torch.empty(programs if learned else 1, width, dtype=torch.float32, device=x.device)
    _norm_gradient[(programs,)](
        x, dh, weight, g, g_low, out, weight_gradient, rows, width, eps, learned, **_block(width)
    )
    return out, weight_gradient.sum(0) if learned else None


@triton.jit
def _norm_gradient(
    x, dh, weight, g, g_low, out, weight_gradient, rows, width, eps, LEARNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < width
    w = tl.load(weight + at, mask=inside, other=0.0)
    of_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        place = row * width + at
        value = tl.load(x + place, mask=inside, other=0.0)
        d = tl.load(dh + place, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
        n = value * scale
        dn = d * w
        dx = scale * (dn - n * (tl.sum(dn * n, 0) / width))
        total = tl.load(g + place, mask=inside, other=0.0) + dx
        tl.store(g + place, total, mask=inside)
        tl.store(g_low + place, total.to(g_low.dtype.element_ty), mask=inside)
        tl.store(out + place, (n * w).to(out.dtype.element_ty), mask=inside)
        of_weight += d * n
    if LEARNED:
        tl.store(weight_gradient + tl.program_id(0) * width + at, of_weight, mask=inside)


def _block(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def turn_and_keep(
    qkv: Tensor, cos: Tensor, sin: Tensor, norms: Tensor | None, eps: float, own: Tensor, at: Tensor,
    heads: tuple[int, int, int],
) -> None:  # fmt: skip
    """Apply norms and rotary positions to queries and keys. Store the keys and values in the cache.

    The new queries overwrite the old ones in ``qkv``.

    Args:
        qkv: ``[B, (H + 2 K) D]``, the queries, keys and values of B tokens.
        cos: ``[B, D]`` float32, the cosines of the rotary angles.
        sin: ``[B, D]`` float32, the sines of the rotary angles.
        norms: ``[2, D]`` float32, the weights of the query norm and the key norm, or None without norms.
        eps: the epsilon of the norms.
        own: ``[2, >= B, K, C, D]``, the cache of keys and values.
        at: ``[1]``, the place of the tokens in the cache's axis of size C.
        heads: the numbers (H, K, D).
    """
    h, k, d = heads
    _turn_and_keep[(len(qkv), h + 2 * k)](
        qkv, cos, sin, cos if norms is None else norms, own, at, own.stride(0), own.shape[3], eps, h, k, d,
        norms is not None, triton.next_power_of_2(d // 2), num_warps=1,
    )  # fmt: skip


@triton.jit
def _turned(first, second, cos, sin, norm, angle, i, eps, D: tl.constexpr, NORMED: tl.constexpr):
    """Apply the norm and the rotary position to the two halves of a head."""
    half = D // 2
    inside = i < half
    if NORMED:
        scale = 1.0 / tl.sqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
        first *= scale * tl.load(norm + i, mask=inside, other=0.0)
        second *= scale * tl.load(norm + half + i, mask=inside, other=0.0)
    a = first * tl.load(cos + angle, mask=inside, other=0.0) - second * tl.load(sin + angle, mask=inside, other=0.0)
    b = second * tl.load(cos + angle + half, mask=inside, other=0.0)
    b += first * tl.load(sin + angle + half, mask=inside, other=0.0)
    return a, b


@triton.jit
def _turn_and_keep(
    qkv, cos, sin, norms, own, at, to_values, room, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < D // 2
    place = qkv + (row * (H + 2 * K) + head) * D + i
    low = tl.load(place, mask=inside, other=0.0)
    high = tl.load(place + D // 2, mask=inside, other=0.0)
    norm = norms + tl.where(head < H, 0, D)
    a, b = _turned(low.to(tl.float32), high.to(tl.float32), cos, sin, norm, row * D + i, i, eps, D, NORMED)
    a, b = a.to(low.dtype), b.to(low.dtype)
    if head < H:
        tl.store(place, a, mask=inside)
        tl.store(place + D // 2, b, mask=inside)
    else:
        is_value = head >= H + K
        k_head = tl.where(is_value, head - H - K, head - H)
        to = own + tl.where(is_value, to_values, 0) + ((row * K + k_head) * room + tl.load(at)) * D + i
        tl.store(to, tl.where(is_value, low, a), mask=inside)
        tl.store(to + D // 2, tl.where(is_value, high, b), mask=inside)


def turn(
    qkv: Tensor, cos: Tensor, sin: Tensor, norms: Tensor | None, eps: float, heads: tuple[int, int, int]
) -> Tensor:
    """Apply norms and rotary positions to queries and keys.

    Args:
        qkv: ``[B, (H + 2 K) D]``, the queries, keys and values of B tokens. They do not change.
        cos: ``[B, D]`` float32, the cosines of the rotary angles.
        sin: ``[B, D]`` float32, the sines of the rotary angles.
        norms: ``[2, D]`` float32, the weights of the query norm and the key norm, or None without norms.
        eps: the epsilon of the norms.
        heads: the numbers (H, K, D).

    Returns:
        The queries and keys ``[B, H + K, D]``.
    """
    h, k, d = heads
    out = torch.empty(len(qkv), h + k, d, dtype=qkv.dtype, device=qkv.device)
    _turn[(len(qkv), h + k)](
        qkv, out, cos, sin, cos if norms is None else norms, eps, h, k, d, norms is not None,
        triton.next_power_of_2(d // 2), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _turn(
    qkv, out, cos, sin, norms, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < D // 2
    place = qkv + (row * (H + 2 * K) + head) * D + i
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + D // 2, mask=inside, other=0.0).to(tl.float32)
    a, b = _turned(low, high, cos, sin, norms + tl.where(head < H, 0, D), row * D + i, i, eps, D, NORMED)
    to = out + (row * (H + K) + head) * D + i
    tl.store(to, a.to(out.dtype.element_ty), mask=inside)
    tl.store(to + D // 2, b.to(out.dtype.element_ty), mask=inside)


def turn_gradient(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int]) -> Tensor:
    """Compute the gradient of ``qkv`` in :func:`turn` without norms.

    Args:
        dq: ``[B, H, D]``, the gradient of the queries after the rotary positions.
        dk: ``[B, K, D]``, the gradient of the keys after the rotary positions.
        dv: ``[B, K, D]``, the gradient of the values.
        cos: ``[B, D]`` float32, the cosines of the rotary angles.
        sin: ``[B, D]`` float32, the sines of the rotary angles.
        heads: the numbers (H, K, D).

    Returns:
        The gradient ``[B, (H + 2 K) D]``.
    """
    h, k, d = heads
    out = torch.empty(len(dq), (h + 2 * k) * d, dtype=dq.dtype, device=dq.device)
    gradients = (x.contiguous() for x in (dq, dk, dv))
    _turn_gradient[(len(dq), h + 2 * k)](
        *gradients, out, cos, sin, h, k, d, triton.next_power_of_2(d // 2), num_warps=1
    )  # fmt: skip
    return out


@triton.jit
def _turn_gradient(
    dq, dk, dv, out, cos, sin, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = D // 2
    i = tl.arange(0, BLOCK)
    inside = i < half
    of_q, of_v = head < H, head >= H + K
    of_k = (head >= H) & (head < H + K)
    q, k, v = dq + (row * H + head) * D + i, dk + (row * K + head - H) * D + i, dv + (row * K + head - H - K) * D + i
    a = tl.load(q, mask=inside & of_q, other=0.0).to(tl.float32)
    a += tl.load(k, mask=inside & of_k, other=0.0).to(tl.float32)
    a += tl.load(v, mask=inside & of_v, other=0.0).to(tl.float32)
    b = tl.load(q + half, mask=inside & of_q, other=0.0).to(tl.float32)
    b += tl.load(k + half, mask=inside & of_k, other=0.0).to(tl.float32)
    b += tl.load(v + half, mask=inside & of_v, other=0.0).to(tl.float32)
    angle = row * D + i
    first = a * tl.load(cos + angle, mask=inside, other=0.0) + b * tl.load(sin + angle + half, mask=inside, other=0.0)
    second = b * tl.load(cos + angle + half, mask=inside, other=0.0)
    second -= a * tl.load(sin + angle, mask=inside, other=0.0)
    to = out + (row * (H + 2 * K) + head) * D + i
    tl.store(to, tl.where(of_v, a, first).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, tl.where(of_v, b, second).to(out.dtype.element_ty), mask=inside)


def gate(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up ``[B, I]``. The columns of ``gate_up [B, 2 I]`` are the gate first and up next."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    _gate[(rows, triton.cdiv(width, 1024))](gate_up, out, width, 1024, num_warps=4)
    return out


@triton.jit
def _gate(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (g / (1.0 + tl.exp(-g)) * up).to(out.dtype.element_ty), mask=inside)


def gate_gradient(gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient of :func:`gate`.

    Args:
        gate_up: ``[B, 2 I]``, the input of :func:`gate`.
        dm: ``[B, I]``, the gradient of its result.

    Returns:
        The gradient of ``gate_up`` ``[B, 2 I]``, and the result of :func:`gate` ``[B, I]``.
    """
    rows, width = dm.shape
    gradient, out = torch.empty_like(gate_up), torch.empty_like(dm)
    _gate_gradient[(rows, triton.cdiv(width, 1024))](gate_up, dm, gradient, out, width, 1024, num_warps=4)
    return gradient, out


@triton.jit
def _gate_gradient(gate_up, dm, gradient, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dm + row * width + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    s = g * share
    of_gate = d * up * share * (1.0 + g * (1.0 - share))
    tl.store(gradient + row * 2 * width + at, of_gate.to(gradient.dtype.element_ty), mask=inside)
    tl.store(gradient + row * 2 * width + width + at, (d * s).to(gradient.dtype.element_ty), mask=inside)
    tl.store(out + row * width + at, (s * up).to(out.dtype.element_ty), mask=inside)

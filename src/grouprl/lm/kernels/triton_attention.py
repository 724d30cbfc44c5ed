"""Attention of a decode step on a GPU, as a Triton kernel.

Shapes use these letters: B rows, H query heads and K key heads of size D, P prompts of at most T tokens, and room for
C tokens of a row.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64
"""The number of keys that attention processes at once."""


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, own: Tensor, prompt: Tensor, length: Tensor, at: Tensor, scale: float,
    window: int | None, heads: tuple[int, int, int],
) -> Tensor:  # fmt: skip
    """Compute the attention of a decode step. The newest token of each row sees its prompt and all tokens of its row.

    Args:
        qkv: ``[B, (H + 2 K) D]``, as :func:`turn_and_keep` leaves it.
        keys: ``[P K, T, D]``, the keys of the prompts.
        values: ``[P K, T, D]``, the values of the prompts.
        own: ``[2, >= B, K, C, D]``, the keys and values of each row's own tokens.
        prompt: ``[B]``, the index of each row's prompt.
        length: ``[B]``, the number of tokens of each row's prompt.
        at: ``[1]``, the place of the newest token in the axis of size C.
        scale: the factor of the scores.
        window: the number of tokens that a token sees, itself included, or None.
        heads: the numbers (H, K, D).

    Returns:
        The attended values ``[B, H D]``.
    """
    h, k, d = heads
    out = torch.empty(len(qkv), h * d, dtype=qkv.dtype, device=qkv.device)
    group = max(16, triton.next_power_of_2(h // k))
    _attend[(len(qkv), k)](
        qkv, out, keys, values, own, prompt, length, at, own.stride(0), keys.shape[1], own.shape[3], scale,
        window or 0, h, k, d, group, max(16, triton.next_power_of_2(d)), _KEYS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _seen(
    q, total, best, out, keys, values, begin, count, far, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr
):
    """Continue a running softmax with ``count`` keys from ``begin`` on. Keys before ``far`` are hidden."""
    d, j = tl.arange(0, BD), tl.arange(0, N)
    for start in range(0, count, N):
        seen = (start + j < count) & (start + j >= far)
        place = (begin + start + j)[:, None] * D + d[None, :]
        inside = seen[:, None] & (d < D)[None, :]
        k = tl.load(keys + place, mask=inside, other=0.0)
        s = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, -1e30)
        now = tl.maximum(best, tl.max(s, 1))
        p = tl.where(seen[None, :], tl.exp(s - now[:, None]), 0.0)
        before = tl.exp(best - now)
        v = tl.load(values + place, mask=inside, other=0.0)
        total = total * before + tl.sum(p, 1)
        out = out * before[:, None] + tl.dot(p.to(v.dtype), v)
        best = now
    return total, best, out


@triton.jit
def _attend(
    qkv, out, keys, values, own, prompt, length, at, to_values, longest, room, scale, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, k_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, d = tl.arange(0, G), tl.arange(0, BD)
    inside = (i < H // K)[:, None] & (d < D)[None, :]
    place = (k_head * (H // K) + i)[:, None] * D + d[None, :]
    q = tl.load(qkv + row * (H + 2 * K) * D + place, mask=inside, other=0.0)
    n, t = tl.load(length + row), tl.load(at)
    far = tl.where(window > 0, n + t - window + 1, 0)
    total, best = tl.zeros([G], tl.float32), tl.full([G], -1e30, tl.float32)
    attended = tl.zeros([G, BD], tl.float32)
    of_prompt = (tl.load(prompt + row) * K + k_head) * longest
    total, best, attended = _seen(q, total, best, attended, keys, values, of_prompt, n, far, scale, D, BD, N)
    of_row = (row * K + k_head) * room
    total, best, attended = _seen(
        q, total, best, attended, own, own + to_values, of_row, t + 1, far - n, scale, D, BD, N
    )
    tl.store(out + row * H * D + place, (attended / total[:, None]).to(out.dtype.element_ty), mask=inside)

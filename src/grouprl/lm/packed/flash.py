"""Attention over packs with the FlashAttention kernels of torch for GPUs (arXiv 2307.08691).

A completion token sees two ranges of the row: its prompt, and its completion up to itself. One kernel call covers the
first range for all groups, and another call covers the second. The calls read the tokens in place, without gathering or
padding.

The forward pass merges the two results with the logarithms of their softmax sums. In the backward pass, each call
receives the merged sums and computes its part of the gradient, as ring attention does (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grouprl.lm.packed.packing import Pack

LARGEST_HEAD = 256
"""The largest size of a head that the kernels support."""


@dataclass(frozen=True)
class QueryKeyRanges:
    """n ranges of queries, and for each one the range of keys that it sees.

    Attributes:
        queries: ``[n + 1]`` int32, the starts of the ranges of queries and the end of the last one.
        keys: ``[n + 1]`` int32, the starts of the ranges of keys and the end of the last one.
        longest: the length of the longest range of queries, and the length of the longest range of keys.
        causal: whether a query sees only the keys up to its own place in the range.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    causal: bool

    @classmethod
    def of(cls, queries: list[int], keys: list[int], device: torch.device, *, causal: bool) -> QueryKeyRanges:
        """Build consecutive ranges from their lengths."""
        ends = torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32).to(device)
        return cls(ends[0], ends[1], (max(queries), max(keys)), causal)


@dataclass(frozen=True)
class Layout:
    """The query and key ranges of a pack.

    Attributes:
        own: each prompt attends to itself, and each completion attends to itself.
        shared: the completions of each group attend to its prompt. It is None if the row has no completion tokens.
        prompts: the number of prompt tokens. They come first in the row.
        alone: the ranges of the prompts that have no completion tokens in the row.
        span: the length of the longest prompt plus the length of the longest completion. A sliding window of this size
            or more hides nothing.
    """

    own: QueryKeyRanges
    shared: QueryKeyRanges | None
    prompts: int
    alone: list[slice]
    span: int

    @classmethod
    def of(cls, pack: Pack) -> Layout:
        """Compute the layout of a pack."""
        prompts = [len(prompt) for prompt, _ in pack.places]
        completions = [len(c) for _, ranges in pack.places for c in ranges if len(c) > 0]
        seeing = [sum(map(len, ranges)) for _, ranges in pack.places]
        device = pack.ids.device
        return cls(
            QueryKeyRanges.of(lengths := prompts + completions, lengths, device, causal=True),
            QueryKeyRanges.of(seeing, prompts, device, causal=False) if completions else None,
            sum(prompts),
            [slice(p.start, p.stop) for (p, _), n in zip(pack.places, seeing, strict=True) if n == 0],
            max(prompts) + max(completions, default=0),
        )


def can_attend(q: Tensor, k: Tensor, dtype: torch.dtype, softcap: float | None) -> bool:
    """Whether the kernels support these tensors. They need half precision on a GPU and no soft cap.

    The function does not check the sliding window, which must hide nothing (:attr:`Layout.span`).

    Args:
        q: ``[S, H, D]``.
        k: ``[S, K, D]``.
        dtype: the dtype of matrix products.
        softcap: the soft cap of the scores, or None.
    """
    heads, d = q.shape[1:]
    return (
        q.is_cuda
        and dtype in (torch.bfloat16, torch.float16)
        and softcap is None
        and d % 8 == 0
        and d <= LARGEST_HEAD
        and heads % k.shape[1] == 0
    )


class Flash(torch.autograd.Function):
    """Attention as a differentiable function of (q, k, v, layout, scale).

    The shapes are ``q [S, H, D]``, ``k, v [S, K, D]`` and ``[S, H, D]`` for the result, all in half precision.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        out, *more = attend(q, k, v, layout, scale)
        ctx.save_for_backward(q, k, v, out, *more)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *gradient(g, *ctx.saved_tensors, layout=ctx.layout, scale=ctx.scale), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, ...]:
    """Compute attention over a pack.

    Args:
        q: ``[S, H, D]`` queries in half precision.
        k: ``[S, K, D]`` keys in half precision.
        v: ``[S, K, D]`` values in half precision.
        layout: the layout of the pack.
        scale: the factor of the scores.

    Returns:
        The attended values ``[S, H, D]``, the logarithms of the softmax sums ``[H, S]``, and the random states of the
        kernels. :func:`gradient` needs all of them.
    """
    p = layout.prompts
    out, lse, *states = _forward(q, k, v, layout.own, scale)
    if layout.shared is not None:
        of_prompt, lse_of_prompt, *more = _forward(q[p:], k[:p], v[:p], layout.shared, scale)
        difference = lse_of_prompt - lse[:, p:]
        share = torch.sigmoid(difference).t()[..., None]
        out[p:] = torch.lerp(out[p:].float(), of_prompt.float(), share)
        lse[:, p:] += F.softplus(difference)
        states += more
    return out, lse, *states


def gradient(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *states: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``q``, ``k`` and ``v``.

    Args:
        g: ``[S, H, D]``, the gradient of the attended values.
        q: ``[S, H, D]`` queries, the input of :func:`attend`.
        k: ``[S, K, D]`` keys, the input of :func:`attend`.
        v: ``[S, K, D]`` values, the input of :func:`attend`.
        out: the attended values that :func:`attend` returned.
        lse: the logarithms of the softmax sums that :func:`attend` returned.
        states: the random states that :func:`attend` returned.
        layout: the layout of the pack.
        scale: the factor of the scores.
    """
    p, g = layout.prompts, g.contiguous()
    with _in_the_same_order():
        dq, dk, dv = _backward(g, q, k, v, out, lse, layout.own, scale, states[:2])
        if layout.shared is not None:
            of_completions = (g[p:], q[p:], k[:p], v[:p], out[p:], lse[:, p:].contiguous())
            more = _backward(*of_completions, layout.shared, scale, states[2:])
            for of_keys in more[1:]:
                for prompt in layout.alone:
                    of_keys[prompt] = 0
            for total, part in zip((dq[p:], dk[:p], dv[:p]), more, strict=True):
                total += part
    return dq, dk, dv


def _forward(
    q: Tensor, k: Tensor, v: Tensor, part: QueryKeyRanges, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the logarithms of the softmax sums ``[H, S]``, and two random states for the backward pass."""
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, part.queries, part.keys, *part.longest, 0.0, part.causal, False, scale=scale
    )
    return out, lse, *state


def _backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    part: QueryKeyRanges,
    scale: float,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        g, q, k, v, out, lse, part.queries, part.keys, *part.longest, 0.0, part.causal, *state, scale=scale
    )
    return dq, dk, dv


@contextmanager
def _in_the_same_order() -> Iterator[None]:
    """Let torch's kernels add numbers in the same order every time, while the context is open."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    # torch.use_deterministic_algorithms would do this too, but it imports torch's compiler, which takes long.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(filled)

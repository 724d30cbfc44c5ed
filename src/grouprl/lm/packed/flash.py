"""Attention over packs by the FlashAttention kernels that torch brings for GPUs (arXiv 2307.08691).

A token of a completion sees two stretches of the row: its prompt and its own past. The kernels do each for all groups
at once, from where the tokens lie: nothing is gathered or padded. What the two give is joined by the logarithms of
their softmax sums; given the joint sums, the kernels' backward passes are each the part of the whole that concerns it
(as in ring attention, arXiv 2310.01889).
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


@dataclass(frozen=True)
class QueryKeyRanges:
    """Stretches of queries and the stretch of keys that each sees.

    Attributes:
        queries, keys: int32 ``[n + 1]`` where they begin and end. longest: of queries and of keys.
        causal: whether a query sees only keys up to its own place.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    causal: bool

    @classmethod
    def of(cls, queries: list[int], keys: list[int], device: torch.device, *, causal: bool) -> QueryKeyRanges:
        """Stretches of these lengths, one behind the other."""
        ends = torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32).to(device)
        return cls(ends[0], ends[1], (max(queries), max(keys)), causal)


@dataclass(frozen=True)
class Layout:
    """What the tokens of a pack see.

    Attributes:
        own: every prompt and every completion by itself. shared: the completions of each group with its prompt, or None
            if no completion is in the row. prompts: tokens of prompts, which come first.
        alone: prompts that no completion in the row sees, where there are others.
        span: tokens of the longest prompt and the longest completion together.
    """

    own: QueryKeyRanges
    shared: QueryKeyRanges | None
    prompts: int
    alone: list[slice]
    span: int

    @classmethod
    def of(cls, pack: Pack) -> Layout:
        """The layout of a pack."""
        prompts = [len(prompt) for prompt, _ in pack.places]
        completions = [len(c) for _, own in pack.places for c in own if len(c) > 0]
        seeing = [sum(map(len, own)) for _, own in pack.places]
        device = pack.ids.device
        return cls(
            QueryKeyRanges.of(stretches := prompts + completions, stretches, device, causal=True),
            QueryKeyRanges.of(seeing, prompts, device, causal=False) if completions else None,
            sum(prompts),
            [slice(p.start, p.stop) for (p, _), n in zip(pack.places, seeing, strict=True) if n == 0],
            max(prompts) + max(completions, default=0),
        )


def can_attend(q: Tensor, k: Tensor, dtype: torch.dtype, softcap: float | None) -> bool:
    """Whether the kernels can do it, but for windows: half precision on a GPU, plain softmax."""
    heads, d = q.shape[1:]
    return (
        q.is_cuda and dtype in (torch.bfloat16, torch.float16) and softcap is None
        and d % 8 == 0 and d <= LARGEST_HEAD and heads % k.shape[1] == 0
    )  # fmt: skip


class Flash(torch.autograd.Function):
    """``q [S, H, D]``, ``k, v [S, K, D]`` in half precision -> ``[S, H, D]``."""

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
    """Attended values ``[S, H, D]``, logarithms of softmax sums ``[H, S]``, and what :func:`gradient` wants besides.

    Args:
        q: ``[S, H, D]``. k, v: ``[S, K, D]``. All in half precision.
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
    """The gradients of ``q``, ``k`` and ``v`` from ``g``, that of the attended values, and what :func:`attend` gave."""
    p, g = layout.prompts, g.contiguous()
    with _in_the_same_order():
        dq, dk, dv = _backward(g, q, k, v, out, lse, layout.own, scale, states[:2])
        if layout.shared is not None:
            ours = (g[p:], q[p:], k[:p], v[:p], out[p:], lse[:, p:].contiguous())
            more = _backward(*ours, layout.shared, scale, states[2:])
            for of_keys in more[1:]:
                for prompt in layout.alone:
                    of_keys[prompt] = 0
            for total, part in zip((dq[p:], dk[:p], dv[:p]), more, strict=True):
                total += part
    return dq, dk, dv


def _forward(
    q: Tensor, k: Tensor, v: Tensor, part: QueryKeyRanges, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, logarithms of the softmax sums ``[H, S]``, and what the backward pass wants besides."""
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, part.queries, part.keys, *part.longest, 0.0, part.causal, False, scale=scale
    )
    return out, lse, *state


def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: QueryKeyRanges, scale: float,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        g, q, k, v, out, lse, part.queries, part.keys, *part.longest, 0.0, part.causal, *state, scale=scale
    )
    return dq, dk, dv


@contextmanager
def _in_the_same_order() -> Iterator[None]:
    """Within, kernels that add up do so in an order that is the same every time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    # torch.use_deterministic_algorithms does the same and imports the compiler
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(filled)

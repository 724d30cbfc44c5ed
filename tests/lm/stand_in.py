"""A stand-in for FlashAttention's kernels, by their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grouprl.lm.packed import flash
from grouprl.lm.packed.flash import QueryKeyRanges


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use it from here on."""
    monkeypatch.setattr(flash, "_forward", forward)
    monkeypatch.setattr(flash, "_backward", backward)


def scores(q: Tensor, k: Tensor, part: QueryKeyRanges, scale: float) -> list[tuple[slice, slice, Tensor]]:
    """Of each pair of stretches the scores ``[H, n, m]``, -inf where a query does not see a key."""
    out = []
    for (a, b), (c, d) in zip(
        *(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True) for ends in (part.queries, part.keys)), strict=True
    ):
        s = scale * torch.einsum("shd,thd->hst", q[a:b], k[c:d])
        if part.causal:
            s = s.masked_fill(torch.ones(b - a, d - c).triu(1 + (d - c) - (b - a)) > 0, -torch.inf)
        out.append((slice(a, b), slice(c, d), s))
    return out


def forward(
    q: Tensor, k: Tensor, v: Tensor, part: QueryKeyRanges, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, dtype = q.shape[1] // k.shape[1], q.dtype
    q, k, v = q.double(), k.double().repeat_interleave(g, 1), v.double().repeat_interleave(g, 1)
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
    for mine, its, s in scores(q, k, part, scale):
        lse[:, mine] = s.logsumexp(-1).float()
        out[mine] = torch.einsum("hst,thd->shd", s.softmax(-1), v[its])
    return out.to(dtype), lse, torch.zeros(2), torch.zeros(1)


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    part: QueryKeyRanges,
    scale: float,
    state: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' formulas: probabilities from the sums they are given, not from sums of their own."""
    assert torch.are_deterministic_algorithms_enabled()
    assert len(state) == 2
    g, k_heads = q.shape[1] // k.shape[1], k.shape[1]
    dtype, (gradient, q, k, v, out) = q.dtype, (x.double() for x in (gradient, q, k, v, out))
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))  # what no query sees is not written
    delta = (gradient * out).sum(-1).t()
    for mine, its, s in scores(q, k, part, scale):
        if mine.start == mine.stop:
            continue
        p = (s - lse[:, mine, None]).exp()
        ds = p * (torch.einsum("shd,thd->hst", gradient[mine], v[its]) - delta[:, mine, None])
        dq[mine] = scale * torch.einsum("hst,thd->shd", ds, k[its])
        dk[its] = scale * torch.einsum("hst,shd->thd", ds, q[mine])
        dv[its] = torch.einsum("hst,shd->thd", p, gradient[mine])
    shared = (len(k), k_heads, g, -1)
    return dq.to(dtype), dk.view(shared).sum(2).to(dtype), dv.view(shared).sum(2).to(dtype)

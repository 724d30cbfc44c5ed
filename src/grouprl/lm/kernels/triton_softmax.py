"""The softmax over the vocabulary on a GPU, as a Triton kernel."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def softmax(z: Tensor, targets: Tensor, temperature: float, *, learning: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the softmax over the vocabulary, as :func:`grouprl.lm.kernels.head.softmax` computes it on a CPU.

    Args:
        z: ``[m, V]`` logits. With ``learning``, the probabilities overwrite them, with 0 for the targets.
        targets: ``[m]`` int64 token ids.
        temperature: a positive number that divides the logits.
        learning: whether to write the probabilities.

    Returns:
        Log-probabilities of the targets in nats, entropies in nats, and the total probability of all other tokens. Each
        is ``[m]`` float32.
    """
    rows, width = z.shape
    terms = torch.empty(3, rows, dtype=torch.float32, device=z.device)
    _softmax[(rows,)](z, targets, terms, rows, width, 1.0 / temperature, learning, 4096, num_warps=8)
    return terms[0], terms[1], terms[2]


@triton.jit
def _softmax(z, targets, terms, rows, width, sharpness, LEARNING: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    here = z + row.to(tl.int64) * width
    target = tl.load(targets + row)
    i = tl.arange(0, BLOCK)
    best = tl.max(tl.full([BLOCK], -float("inf"), tl.float32), 0)
    total = tl.sum(tl.zeros([BLOCK], tl.float32), 0)
    others, moment = total, total  # others: sum of exp without the target. moment: sum of exp * (x - best).
    at_target = total
    for start in range(0, width, BLOCK):
        at = start + i
        x = tl.load(here + at, mask=at < width, other=-float("inf")).to(tl.float32) * sharpness
        now = tl.maximum(best, tl.max(x, 0))
        e = tl.where(at < width, tl.exp(x - now), 0.0)
        distance = tl.where(e > 0.0, x - now, 0.0)
        before = tl.where(total > 0.0, tl.exp(best - now), 0.0)
        moment = tl.where(total > 0.0, before * (moment + total * (best - now)), 0.0) + tl.sum(e * distance, 0)
        at_target += tl.sum(tl.where(at == target, x, 0.0), 0)
        others = others * before + tl.sum(tl.where(at == target, 0.0, e), 0)
        total = total * before + tl.sum(e, 0)
        best = now
    tl.store(terms + row, at_target - best - tl.log(total))
    tl.store(terms + rows + row, tl.log(total) - moment / total)
    tl.store(terms + 2 * rows + row, others / total)
    if LEARNING:
        for start in range(0, width, BLOCK):
            at = start + i
            x = tl.load(here + at, mask=at < width, other=0.0).to(tl.float32) * sharpness
            p = tl.where(at == target, 0.0, tl.exp(x - best) / total)
            tl.store(here + at, p.to(z.dtype.element_ty), mask=at < width)

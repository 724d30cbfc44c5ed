"""Drawing one token per row from logits [B, V]: temperature, repetition penalty, filters, and an exact inverse CDF."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256
_NEVER = float("-inf")


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn; every setting is explicit, none is taken from a checkpoint.

    Attributes:
        temperature: logits are divided by it; 0 means greedy.
        top_k: keep the k likeliest tokens (0: all). top_p: keep the smallest set of likeliest tokens whose probability
            reaches p. min_p: keep tokens at least min_p times as likely as the likeliest. Applied in this order.
        repetition_penalty: logits of tokens in prompt or completion are divided (if positive) or multiplied by it.
        max_new_tokens: most tokens of a completion. min_new_tokens: no end of sequence before.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits), exactly: ``[B]`` ids and their log-probabilities ``[B]`` float32.

    Inverse CDF in two levels: the cumulative sum over blocks of tokens finds the block, the one within it the token, so
    only V / 256 + 256 numbers per row are scanned instead of V.

    Args:
        logits: ``[B, V]`` float32, overwritten.
        uniform: ``[B]`` in [0, 1).
    """
    rows, vocabulary = logits.shape
    logits.sub_(logits.amax(-1, keepdim=True))
    padded = -vocabulary % _BLOCK
    # float64 over blocks: with V terms a float32 sum would bias the last tokens.
    p = logits.exp()
    if padded:
        p = torch.nn.functional.pad(p, (0, padded))
    p = p.view(rows, -1, _BLOCK)
    blocks = p.sum(-1).double().cumsum(-1)
    total = blocks[:, -1:]
    at = uniform.double()[:, None] * total
    block = torch.searchsorted(blocks, at, right=True).clamp_(max=p.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = p[torch.arange(rows, device=p.device), block[:, 0]].double()
    inner = within.cumsum(-1)
    token = torch.searchsorted(inner, (at - before).clamp_(min=0.0), right=True)
    # Rounding may point past the last token that has any probability: take that one.
    last = _BLOCK - 1 - (within.flip(-1) > 0).int().argmax(-1, keepdim=True)
    token = torch.minimum(token, last) + block * _BLOCK
    logp = logits.gather(1, token)[:, 0] - total[:, 0].log().float()
    return token[:, 0], logp


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row and its log-probability under softmax(logits)."""
    best, token = logits.max(-1)
    return token, best - logits.logsumexp(-1)


def keep_likely(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Set the logits ``[B, V]`` of tokens that the filters leave out to -inf, in place; the likeliest always stays."""
    if settings.top_k > 0:
        k = min(settings.top_k, logits.shape[-1])
        logits.masked_fill_(logits < logits.topk(k, -1).values[:, -1:], _NEVER)
    if settings.top_p < 1.0:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0.0
        out = before >= settings.top_p
        logits.masked_fill_(torch.zeros_like(out).scatter_(1, index, out), _NEVER)
    if settings.min_p > 0.0:
        best = logits.amax(-1, keepdim=True)
        logits.masked_fill_(logits - best < math.log(settings.min_p), _NEVER)
    return logits


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's rule (arXiv 1909.05858): divide positive, multiply negative logits of tokens in ``seen [B, V]`` bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

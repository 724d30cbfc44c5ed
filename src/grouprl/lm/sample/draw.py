"""Drawing one token per row from logits [B, V]: temperature, repetition penalty, filters, and an exact inverse CDF."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grouprl.lm.sample.stopping import Stops

_BLOCK = 256
_NEVER = float("-inf")


@dataclass(frozen=True)
class SamplingSettings:
    """How to draw tokens. The sampler uses these settings alone and ignores the generation settings of a checkpoint.

    The filters apply in the order top_k, top_p, min_p.

    Attributes:
        max_new_tokens: the most tokens of a completion. In an episode they are the most tokens behind a prompt, those
            of the partner included.
        temperature: the sampler divides logits by it. With 0 it always takes the likeliest token.
        top_k: keep the k likeliest tokens. 0 keeps all tokens.
        top_p: keep the smallest set of likeliest tokens whose total probability reaches top_p. 1 keeps all tokens.
        min_p: keep the tokens that are at least min_p times as likely as the likeliest one. 0 keeps all tokens.
        repetition_penalty: for tokens that occur in the prompt or the completion, the sampler divides positive logits
            by it and multiplies negative logits by it. 1 changes nothing.
        min_new_tokens: the sampler draws no end-of-sequence token before the completion, or the turn of an episode, has
            this many tokens.
        max_turn_tokens: the most tokens of a turn in an episode, or None if ``max_new_tokens`` alone limits it.
        stop: texts that end a completion or a turn, from ``min_new_tokens`` tokens on, or None.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    max_turn_tokens: int | None = None
    stop: Stops | None = None

    @property
    def filtered(self) -> bool:
        """Whether a filter (top_k, top_p or min_p) may exclude tokens."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits), exactly.

    The function inverts the cumulative distribution in two levels. A cumulative sum over blocks of 256 tokens finds the
    block, and a cumulative sum within the block finds the token. So it scans V / 256 + 256 numbers per row and not V.

    Args:
        logits: ``[B, V]`` float32. The function overwrites them.
        uniform: ``[B]`` random numbers in [0, 1).

    Returns:
        The token ids ``[B]`` int64 and their log-probabilities ``[B]`` float32 in nats. Where a logit of a row is NaN
        or inf, or all are -inf, its log-probability is NaN and its token is any.
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
    # Rounding may point past the last token with a positive probability: take this token then.
    last = _BLOCK - 1 - (within.flip(-1) > 0).int().argmax(-1, keepdim=True)
    token = (torch.minimum(token, last) + block * _BLOCK).clamp_(max=vocabulary - 1)
    logp = logits.gather(1, token)[:, 0] - total[:, 0].log().float()
    return token[:, 0], logp


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Take the likeliest token of each row.

    Args:
        logits: ``[B, V]`` float32.

    Returns:
        The token ids ``[B]`` int64 and their log-probabilities ``[B]`` float32 in nats under softmax(logits).
    """
    best, token = logits.max(-1)
    return token, best - logits.logsumexp(-1)


def keep_likely(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Set the logits of the tokens that the filters exclude to -inf. The likeliest token of a row always stays.

    Args:
        logits: ``[B, V]`` float32. The function changes them in place.
        settings: the filters top_k, top_p and min_p.

    Returns:
        ``logits``.
    """
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
    """Make tokens that occurred before less likely, by the rule of CTRL (arXiv 1909.05858).

    The function divides positive logits of these tokens by the penalty and multiplies negative logits by it.

    Args:
        logits: ``[B, V]``.
        seen: ``[B, V]`` bool, True for the tokens that occurred.
        penalty: a positive number. 1 changes nothing, and a larger number makes repetition less likely.

    Returns:
        New logits ``[B, V]``.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def token_and_log_prob(logits: Tensor, settings: SamplingSettings, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Take or draw one token per row from ``logits [B, V]`` float32, as the settings say, by ``uniform [B]``.

    Returns the token ids ``[B]`` int64 and their log-probabilities ``[B]`` float32 in nats. This may overwrite logits.
    """
    if settings.temperature == 0.0:
        return greedy(logits)
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.filtered:
        logits = keep_likely(logits, settings)
    return draw(logits, uniform)

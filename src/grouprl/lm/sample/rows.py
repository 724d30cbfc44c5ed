"""Completions in the making: what was drawn for each row of a batch, and how its next token is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grouprl.lm.sample.draw import SamplingSettings, draw, greedy, keep_likely, penalise_repetition

Adjust = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [B, V], which completions the rows are [B], tokens drawn so far [1]) -> logits; called before drawing. On a
GPU it may be recorded and replayed (recordings.py), and some of the completions may have ended;
what is drawn for those is dropped."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: ``[n]`` token ids as sampled, the end-of-sequence token included if it ended by itself.
        logp: ``[n]`` log-probability of each under the distribution it was drawn from.
        finished: whether it ended by itself; otherwise it was cut at the maximal length.
    """

    ids: list[int]
    logp: Tensor
    finished: bool


class Rows:
    """``group_size`` rows of each prompt.

    :meth:`draw_tokens` works on tensors that stay where they are, and on no Python number that changes from step to
    step. So a GPU can do it again from a recording.

    Args:
        end_ids: the tokens that end a completion. generator: on the CPU.
        first: the number of the first row, as ``adjust`` is told it.
        ahead: for how many steps random numbers are drawn at once.

    Attributes:
        token, position: ``[B]`` the newest token of each row and where it stands.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], group_size: int, settings: SamplingSettings, end_ids: Sequence[int],
        vocabulary: int, device: torch.device, generator: torch.Generator, adjust: Adjust | None = None, first: int = 0,
        ahead: int = 1,
    ) -> None:  # fmt: skip
        n, longest = len(prompts) * group_size, settings.max_new_tokens
        self.settings, self.device, self.adjust, self.first = settings, device, adjust, first
        self._generator = generator
        self._end_ids = torch.tensor([i for i in end_ids if i < vocabulary], device=device, dtype=torch.int64)
        self._ends = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._ends[self._end_ids] = True
        self._seen: Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self._seen = torch.zeros(n, vocabulary, dtype=torch.bool, device=device)
            for i, prompt in enumerate(prompts):
                self._seen[i * group_size : (i + 1) * group_size, torch.tensor(prompt, device=device)] = True
        self._uniform = torch.empty(ahead, n, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._which = torch.arange(n, device=device)
        self.token = torch.zeros(n, dtype=torch.int64, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.position = (lengths - 1).repeat_interleave(group_size)
        self._tokens = torch.zeros(n, longest, dtype=torch.int64, device=device)
        self._logps = torch.zeros(n, longest, device=device)
        self._lengths = torch.zeros(n, dtype=torch.int64, device=device)
        self._ended = torch.zeros(n, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self._which)

    def prepare(self, step: int) -> None:
        """Before token ``step`` is taken: draw the random numbers it needs, if they are not there yet.

        One number per row of the beginning: a row's draws do not depend on which other rows still run.
        """
        if step % len(self._uniform) == 0:
            fresh = torch.rand(self._uniform.shape, generator=self._generator)
            if self.device.type == "cuda":  # without waiting for what it has yet to do
                fresh = fresh.pin_memory()
            self._uniform.copy_(fresh, non_blocking=True)

    def draw_tokens(self, logits: Tensor) -> None:
        """Draw the next token of each row from ``logits [B, V]`` float32, which are overwritten."""
        rows, at, settings = self._which, self._at, self.settings
        if self.adjust is not None:
            logits = self.adjust(logits, rows + self.first, at)
        if self._seen is not None:
            logits = penalise_repetition(logits, self._seen[rows], settings.repetition_penalty)
        if settings.min_new_tokens > 0:
            early = at < settings.min_new_tokens
            logits[:, self._end_ids] = logits[:, self._end_ids].masked_fill(early, float("-inf"))
        token, logp = _token_and_log_prob(logits, settings, self._uniform[at % len(self._uniform), rows])
        before = self._ended[rows]
        self._tokens[rows, at], self._logps[rows, at] = token, logp
        self._lengths[rows] = torch.where(before, self._lengths[rows], at + 1)
        self._ended[rows] = before | self._ends[token]
        if self._seen is not None:
            self._seen[rows, token] = True
        self.token.copy_(token)
        self.position += 1
        at += 1

    def ended(self) -> list[int]:
        """Which rows have ended: the one thing a GPU is asked for while it samples."""
        over = self._ended[self._which]
        return over.nonzero()[:, 0].tolist() if self.device.type == "cuda" or bool(over.any()) else []

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        index = torch.tensor(rows, device=self.device)
        self._which, self.token, self.position = self._which[index], self.token[index], self.position[index]

    def completions(self) -> list[Completion]:
        """What was drawn, row after row of the beginning."""
        tokens, logps, ended = self._tokens.cpu(), self._logps.cpu(), self._ended.tolist()
        return [
            Completion(tokens[i, :n].tolist(), logps[i, :n], ended[i]) for i, n in enumerate(self._lengths.tolist())
        ]


def _token_and_log_prob(logits: Tensor, settings: SamplingSettings, uniform: Tensor) -> tuple[Tensor, Tensor]:
    if settings.temperature == 0.0:
        return greedy(logits)
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.filtered:
        logits = keep_likely(logits, settings)
    return draw(logits, uniform)

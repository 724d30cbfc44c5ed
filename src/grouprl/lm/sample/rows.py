"""The rows of a batch: the tokens drawn so far for each completion, and the draw of the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grouprl.lm.sample.draw import SamplingSettings, penalise_repetition, token_and_log_prob
from grouprl.lm.sample.finite import NotFiniteError, all_finite
from grouprl.lm.sample.streams import Draws

Adjust = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function that changes logits before each draw.

Its arguments are the logits ``[B, V]``, the index ``[B]`` of each row's completion, and the number ``[1]`` of tokens
drawn so far. It returns logits ``[B, V]``. On a GPU the sampler may record it once and replay it
(:mod:`grouprl.lm.sample.recordings`). Some rows may have ended already; the sampler discards the tokens it draws for
them."""


AHEAD = 64
"""The most tokens for which random numbers are drawn at once. For few rows, a call costs more than the numbers."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: the ``n`` sampled token ids. They include the end-of-sequence token if the completion has one.
        logp: ``[n]`` float32, on the CPU. The log-probability in nats of each token under the distribution from which
            it was drawn.
        finished: True if the completion ended by itself, False if the maximal length cut it off.
        stopped: True if it ended with a stop string, and not with an end-of-sequence token.
        model_logp: ``[n]`` float32, on the CPU. The same under the model's own distribution, without temperature,
            penalties and filters, where the sampler keeps it.
    """

    ids: list[int]
    logp: Tensor
    finished: bool
    model_logp: Tensor | None = None
    stopped: bool = False


class Rows:
    """Draws the tokens of B rows and stores them.

    A GPU can replay :meth:`draw_tokens` from a recording: the method keeps its tensors at the same addresses and
    depends on no Python number that changes from step to step.

    Args:
        prompts: the token ids of each of the P prompts.
        group_size: the number of rows of each prompt, so that B = P * group_size at first.
        settings: how to draw tokens.
        end_ids: the ids of the tokens that end a completion.
        vocabulary: the number of tokens V.
        device: the device of the logits.
        draws: the random numbers of the rows.
        adjust: changes the logits before each draw, or None.
        first: the index of the first row's completion, as ``adjust`` receives it.

    Attributes:
        token: ``[B]`` int64, the newest token of each row.
        position: ``[B]`` int64, the position of that token in its sequence.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        end_ids: Sequence[int],
        vocabulary: int,
        device: torch.device,
        draws: Draws,
        adjust: Adjust | None = None,
        first: int = 0,
    ) -> None:
        n, longest = len(prompts) * group_size, settings.max_new_tokens
        self.settings, self.device, self.adjust, self.first = settings, device, adjust, first
        self._draws = draws
        self._end_set = set(end_ids)
        self._end_ids = torch.tensor([i for i in end_ids if i < vocabulary], device=device, dtype=torch.int64)
        self._ends = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._ends[self._end_ids] = True
        self._seen: Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self._seen = torch.zeros(n, vocabulary, dtype=torch.bool, device=device)
            for i, prompt in enumerate(prompts):
                self._seen[i * group_size : (i + 1) * group_size, torch.tensor(prompt, device=device)] = True
        self._uniform = torch.empty(min(AHEAD, longest), n, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._which = torch.arange(n, device=device)
        self.token = torch.zeros(n, dtype=torch.int64, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.position = (lengths - 1).repeat_interleave(group_size)
        self._tokens = torch.zeros(n, longest, dtype=torch.int64, device=device)
        self._logps = torch.zeros(n, longest, device=device)
        self._lengths = torch.zeros(n, dtype=torch.int64, device=device)
        self._ended = torch.zeros(n, dtype=torch.bool, device=device)
        self._may_stop = None if settings.stop is None else settings.stop.may_end(vocabulary)
        self._stopped: set[int] = set()
        self._looked = 0

    def __len__(self) -> int:
        return len(self._which)

    def prepare(self, step: int) -> None:
        """Draw the random numbers for token ``step``, if no earlier call has drawn them. Call this before a step."""
        if step % len(self._uniform) == 0:
            fresh = self._draws.uniform(step, len(self._uniform))
            if self.device.type == "cuda":  # a copy from pinned memory does not wait for the GPU
                fresh = fresh.pin_memory()
            self._uniform.copy_(fresh, non_blocking=True)

    def draw_tokens(self, logits: Tensor) -> None:
        """Draw the next token of each row from ``logits [B, V]`` float32. This overwrites ``logits``."""
        rows, at, settings = self._which, self._at, self.settings
        if self.adjust is not None:
            logits = self.adjust(logits, rows + self.first, at)
        if self._seen is not None:
            logits = penalise_repetition(logits, self._seen[rows], settings.repetition_penalty)
        if settings.min_new_tokens > 0:
            early = at < settings.min_new_tokens
            logits[:, self._end_ids] = logits[:, self._end_ids].masked_fill(early, float("-inf"))
        token, logp = token_and_log_prob(logits, settings, self._uniform[at % len(self._uniform), rows])
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
        """The indices of the rows that have ended. On a GPU this waits for all work launched so far."""
        self._look_for_stops()
        over = self._ended[self._which]
        return over.nonzero()[:, 0].tolist() if self.device.type == "cuda" or bool(over.any()) else []

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with the rows that have these indices, in this order, and with no others."""
        index = torch.tensor(rows, device=self.device)
        self._which, self.token, self.position = self._which[index], self.token[index], self.position[index]

    def completions(self) -> list[Completion]:
        """The completions of all rows, the removed rows too, in the order of the constructor.

        Raises NotFiniteError if logits were not finite. A log-probability shows this, so that no step needs to ask.
        """
        self._look_for_stops()
        tokens, logps, ended = self._tokens.cpu(), self._logps.cpu(), self._ended.tolist()
        if not all_finite(logps.masked_fill(torch.arange(logps.shape[1]) >= self._lengths.cpu()[:, None], 0.0)):
            raise NotFiniteError("logits are not finite")
        return [
            Completion(tokens[i, :n].tolist(), logps[i, :n], ended[i], stopped=i in self._stopped)
            for i, n in enumerate(self._lengths.tolist())
        ]

    def _look_for_stops(self) -> None:
        """End rows where a stop string was completed since the last look; what they drew behind it is left out."""
        stop, drawn = self.settings.stop, 0 if self._may_stop is None else int(self._at)
        if stop is None or self._may_stop is None or drawn == self._looked:
            return
        new, lengths = self._tokens[:, self._looked : drawn].cpu(), self._lengths.tolist()
        for row, i in self._may_stop[new].nonzero().tolist():
            n = self._looked + i + 1
            if row in self._stopped or n > lengths[row] or n < self.settings.min_new_tokens:
                continue
            if int(new[row, i]) in self._end_set or not stop.ends(self._tokens[row, :n].tolist()):
                continue
            self._stopped.add(row)
            self._ended[row], self._lengths[row] = True, n
        self._looked = drawn

"""Sampling episodes of several turns: rows that decode, rows that wait for a reply, and rows whose reply is read.

One step of the model appends to every row that does not wait what is new to it: the token it drew last, or that and the
reply that has come. So reading a reply costs no step of its own, and nothing is read twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.lm.sample.appending import AppendingDecoder
from grouprl.lm.sample.draw import SamplingSettings, penalise_repetition, token_and_log_prob
from grouprl.lm.sample.finite import NotFiniteError
from grouprl.lm.sample.progress import Bounds, InProgress
from grouprl.lm.sample.replies import Replies, replies_of
from grouprl.lm.sample.streams import Draws
from grouprl.lm.sample.turns import Partner, Reply, Sampled

STEP_TOKENS = 2048
"""The most tokens that a step reads, a longer reply aside. This limits the memory for the activations of a step."""

_NUMBERS = 64
"""How many random numbers of a row are drawn at once: a call costs more than the numbers."""


def play(
    decoder: AppendingDecoder,
    slots: int,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    settings: SamplingSettings,
    end_ids: Sequence[int],
    partner: Partner,
    draws: Draws,
    context: int | None,
    prompt_tokens: int,
) -> list[list[Sampled]]:
    """Sample ``group_size`` episodes of each prompt; :meth:`grouprl.lm.sample.sampler.Sampler.sample_episodes`.

    Args:
        decoder: holds ``slots`` rows.
        draws: the random numbers of the episodes.
        prompt_tokens: the most prompt tokens that one pass reads, a longer prompt aside.

    Raises:
        UsageError: a prompt leaves no room for a turn.
        NotFiniteError: logits are not finite.
    """
    episodes = len(prompts) * group_size
    for prompt in prompts:
        if context is not None and len(prompt) >= context:
            raise UsageError(
                f"a prompt has {len(prompt)} tokens, and the model reads {context} at most, so it leaves no room for a "
                "turn; leave out such prompts"
            )
    with replies_of(partner, min(episodes, slots)) as replies:
        game = _Game(decoder, slots, settings, end_ids, replies, draws, context, prompt_tokens)
        return game.play([prompts[i // group_size] for i in range(episodes)], group_size)


@dataclass(eq=False)
class _Row:
    """An episode that is decoded.

    Attributes:
        slot: where it is. own: the episode. new: the tokens that the decoder has not read yet.
        drawn: the tokens that the model drew in the episode. numbers: random numbers for the next tokens.
    """

    slot: int
    own: InProgress
    new: list[int] = field(default_factory=list)
    drawn: int = 0
    numbers: list[float] = field(default_factory=list)


class _Game:
    """Episodes that are sampled together. :func:`play` describes the arguments."""

    def __init__(
        self,
        decoder: AppendingDecoder,
        slots: int,
        settings: SamplingSettings,
        end_ids: Sequence[int],
        replies: Replies,
        draws: Draws,
        context: int | None,
        prompt_tokens: int,
    ) -> None:
        self._decoder, self._settings, self._replies, self._draws = decoder, settings, replies, draws
        self._bounds, self._prompt_tokens = Bounds(settings, context), prompt_tokens
        self._ends, self._end_ids, self._slots = set(end_ids), list(end_ids), slots
        self._free = list(range(slots))[::-1]
        self._running: list[_Row] = []
        self._rows: dict[int, _Row] = {}
        self._seen: Tensor | None = None
        self._may_stop: Tensor | None = None
        self._done: dict[int, list[Sampled]] = {}

    def play(self, prompts: Sequence[Sequence[int]], group_size: int) -> list[list[Sampled]]:
        """Sample an episode of each of the prompts, of which ``group_size`` in a row are the same."""
        started = 0
        while True:
            started = self._start(prompts, started, group_size)
            if not self._running and not self._replies.due:
                break
            self._step()
            self._take_replies()
        return [self._done[episode] for episode in range(len(prompts))]

    # --- rows come ----------------------------------------------------------------------------------------------------

    def _start(self, prompts: Sequence[Sequence[int]], started: int, group_size: int) -> int:
        """Start further episodes in the free slots. Returns how many have been started."""
        new: list[_Row] = []
        while self._free and started < len(prompts):
            row = _Row(self._free.pop(), InProgress(started, self._bounds, list(prompts[started])))
            self._rows[started] = row
            new.append(row)
            started += 1
        groups: dict[int, list[_Row]] = {}
        for row in new:
            groups.setdefault(row.own.episode // group_size, []).append(row)
        self._read_prompts(list(groups.values()))
        return started

    def _read_prompts(self, groups: Sequence[Sequence[_Row]]) -> None:
        """Read the prompt of each group of rows once, and draw a token in every row."""
        part: list[Sequence[_Row]] = []
        tokens = 0
        for group in [*groups, None]:
            length = 0 if group is None else len(group[0].own.prompt)
            if part and (group is None or tokens + length > self._prompt_tokens):
                slots = [[row.slot for row in rows] for rows in part]
                logits = self._decoder.begin([rows[0].own.prompt for rows in part], slots)
                rows = [row for rows in part for row in rows]
                of = torch.tensor([i for i, some in enumerate(part) for _ in some], device=logits.device)
                self._saw(rows, [row.own.prompt for row in rows], logits.shape[-1], logits.device, anew=True)
                self._draw(rows, logits[of])
                part, tokens = [], 0
            if group is not None:
                part.append(group)
                tokens += length

    def _take_replies(self) -> None:
        """Let rows come back whose replies have come.

        If the rows of a step influence each other's rounding, they come back all together, as soon as as many wait as
        run. So it is the tokens that decide which rows share a step, and not the clock.
        """
        due, running = self._replies.due, len(self._running)
        if not due or not (self._decoder.independent or due >= running):
            return
        if self._decoder.independent:
            answers = self._replies.take(at_least=0 if running else 1)
        else:
            answers = self._replies.take(at_least=due)
        anew = [row for episode, reply in answers if (row := self._answer(self._rows[episode], reply)) is not None]
        self._read_prompts([[row] for row in anew])

    def _answer(self, row: _Row, reply: Reply) -> _Row | None:
        """Go on with a row, or end its episode. Returns the row if its new prompt must be read first."""
        if not row.own.hear(reply):
            self._done[row.own.episode] = row.own.samples
            self._decoder.end(row.slot)
            self._free.append(row.slot)
            del self._rows[row.own.episode]
            return None
        if reply.anew:
            row.new = []
            return row
        row.new += reply.ids
        self._running.append(row)
        return None

    # --- steps --------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Append what is new to the running rows, and draw a token in each."""
        rows: list[_Row] = []
        tokens = 0
        for row in self._running:
            if rows and tokens + len(row.new) > STEP_TOKENS:
                break
            rows.append(row)
            tokens += len(row.new)
        if not rows:
            return
        self._running = self._running[len(rows) :]
        new = [row.new for row in rows]
        logits = self._decoder.append([row.slot for row in rows], new)
        self._saw(rows, new, logits.shape[-1], logits.device)
        self._draw(rows, logits)

    def _saw(
        self, rows: Sequence[_Row], tokens: Sequence[Sequence[int]], vocabulary: int, device: torch.device, *,
        anew: bool = False,
    ) -> None:  # fmt: skip
        """Remember tokens of rows, if a penalty asks which there were."""
        if self._settings.repetition_penalty == 1.0:
            return
        if self._seen is None:
            self._seen = torch.zeros(self._slots, vocabulary, dtype=torch.bool, device=device)
        for row, ids in zip(rows, tokens, strict=True):
            if anew:
                self._seen[row.slot] = False
            self._seen[row.slot, torch.tensor(list(ids), device=device)] = True

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Draw the next token of each of n rows from ``logits [n, V]``. Then a row runs on, or waits for a reply."""
        settings = self._settings
        if settings.stop is not None and self._may_stop is None:
            self._may_stop = settings.stop.may_end(logits.shape[-1])
        if self._seen is not None:
            slots = torch.tensor([row.slot for row in rows], device=logits.device)
            logits = penalise_repetition(logits, self._seen[slots], settings.repetition_penalty)
        early = [i for i, row in enumerate(rows) if len(row.own.ids) - row.own.start < settings.min_new_tokens]
        if early:
            ends = torch.tensor([i for i in self._end_ids if i < logits.shape[-1]], device=logits.device)
            logits[torch.tensor(early, device=logits.device)[:, None], ends] = -math.inf
        uniform = torch.tensor(self._numbers(rows), device=logits.device)
        tokens, logps = token_and_log_prob(logits, settings, uniform)
        for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
            if not math.isfinite(logp):
                raise NotFiniteError("logits are not finite")
            row.new = [token]
            row.own.ids.append(token)
            row.own.logp.append(logp)
            row.drawn += 1
            n = len(row.own.ids) - row.own.start
            stopped = token not in self._ends and self._stops(row, token, n)
            finished = stopped or token in self._ends
            if finished or row.own.room_in_turn <= 0:
                self._replies.ask(row.own.episode, row.own.end_turn(finished=finished, stopped=stopped))
            else:
                self._running.append(row)

    def _stops(self, row: _Row, token: int, n: int) -> bool:
        """Whether ``token``, the last of the n tokens of a turn, completes a stop string in it."""
        stop = self._settings.stop
        if stop is None or self._may_stop is None or n < self._settings.min_new_tokens:
            return False
        return bool(self._may_stop[token]) and stop.ends(row.own.ids[row.own.start :])

    def _numbers(self, rows: Sequence[_Row]) -> list[float]:
        """The random number of each row for its next token. A row counts the tokens that it drew in all its samples."""
        new = [row for row in rows if row.drawn % _NUMBERS == 0]
        if new:
            numbers = self._draws.of([row.own.episode for row in new]).uniform([row.drawn for row in new], _NUMBERS)
            for row, column in zip(new, numbers.t().tolist(), strict=True):
                row.numbers = column
        return [row.numbers[row.drawn % _NUMBERS] for row in rows]

"""An episode in progress, whoever samples its turns: how turns, replies and new beginnings become samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from grouprl.errors import TrainingError
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.turns import Reply, Sampled, Turn


@dataclass(frozen=True)
class Bounds:
    """How long samples may become.

    Attributes:
        settings: ``max_new_tokens`` limits all that follows a prompt, ``max_turn_tokens`` a turn.
        context: the most tokens of a prompt and what follows it, or None.
    """

    settings: SamplingSettings
    context: int | None

    def room(self, prompt: Sequence[int], n: int) -> int:
        """How many tokens may follow a prompt and n tokens."""
        room = self.settings.max_new_tokens - n
        return room if self.context is None else min(room, self.context - len(prompt) - n)


@dataclass(eq=False)
class InProgress:
    """An episode in progress.

    Attributes:
        episode: its number. bounds: how long its samples may become.
        prompt: of its newest sample. ids, turns, logp, finished: of that sample, as in :class:`Sampled`.
        start: where the turn began in ``ids``. samples: those that are complete.
    """

    episode: int
    bounds: Bounds
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    start: int = 0
    samples: list[Sampled] = field(default_factory=list)

    @property
    def room(self) -> int:
        """How many tokens may follow those that are there."""
        return self.bounds.room(self.prompt, len(self.ids))

    @property
    def room_in_turn(self) -> int:
        """How many further tokens the turn may have."""
        most = self.bounds.settings.max_turn_tokens
        return self.room if most is None else min(self.room, most - (len(self.ids) - self.start))

    def end_turn(self, *, finished: bool, stopped: bool) -> Turn:
        """Complete the turn, as :class:`Turn` has it; its tokens are in ``ids``."""
        self.turns.append((self.start, len(self.ids)))
        self.finished.append(finished)
        return Turn(self.ids[self.start :], finished, stopped)

    def hear(self, reply: Reply) -> bool:
        """Go on with a reply, or end the episode. Returns whether it goes on; with ``anew`` by a new sample.

        Raises TrainingError if the reply begins a sample without a prompt.
        """
        if reply.anew and not reply.over and not len(reply.ids):
            raise TrainingError(f"the partner began episode {self.episode} anew with an empty prompt")
        room = self.bounds.room(reply.ids, 0) if reply.anew else self.room - len(reply.ids)
        if reply.over or room <= 0:
            self._end_sample()
            return False
        if reply.anew:
            self._end_sample()
            self.prompt, self.start = list(reply.ids), 0
            self.ids, self.turns, self.logp, self.finished = [], [], [], []
        else:
            self.ids += reply.ids
            self.start = len(self.ids)
        return True

    def _end_sample(self) -> None:
        stop = self.turns[-1][1]
        logp = torch.tensor(self.logp, dtype=torch.float32)
        self.samples.append(Sampled(self.prompt, self.ids[:stop], self.turns, logp, self.finished))

"""Episodes whose turns vLLM samples: each turn is a request of tokens, with all that was said before it as its prompt.

Tokens are only ever appended, as :mod:`grouprl.lm.sample.turns` says. vLLM finds the keys and values of the prompt in
its prefix cache, from the turn before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grouprl.lm.engines.engine import Request
from grouprl.lm.sample.progress import Bounds, InProgress
from grouprl.lm.sample.replies import replies_of
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.streams import Draws
from grouprl.lm.sample.turns import Partner, Reply, Sampled, Turn

SampleTurns = Callable[[Sequence[Request]], list[Completion]]
"""Samples a completion for each request."""


def play(
    sample: SampleTurns,
    prompts: Sequence[Sequence[int]],
    bounds: Bounds,
    partner: Partner,
    draws: Draws,
    *,
    side_by_side: bool,
) -> list[list[Sampled]]:
    """An episode of each prompt, with its samples.

    Args:
        sample: asks vLLM. bounds: how long samples may become. partner: the other side.
        draws: the random numbers of the episodes, of which each turn has a seed.
        side_by_side: whether ``sample`` may be called from several threads at once. Then each episode goes on as soon
            as it can. Otherwise all sample a turn together and wait for all replies, and it is the tokens that decide
            which requests share a step of vLLM, and not the clock.
    """
    rows = [InProgress(i, bounds, list(prompt)) for i, prompt in enumerate(prompts)]
    turns = _Turns(sample, draws)
    if side_by_side:
        _each_by_itself(rows, turns, partner)
    else:
        _all_together(rows, turns, partner)
    return [row.samples for row in rows]


class _Turns:
    """Samples turns of episodes. :func:`play` describes the arguments."""

    def __init__(self, sample: SampleTurns, draws: Draws) -> None:
        self._sample, self._draws = sample, draws

    def of(self, rows: Sequence[InProgress]) -> list[Turn]:
        """The next turn of each episode."""
        found = []
        for row, said in zip(rows, self._sample([self._request(row) for row in rows]), strict=True):
            row.ids += said.ids
            row.logp += said.logp.tolist()
            found.append(row.end_turn(finished=said.finished, stopped=said.stopped))
        return found

    def _request(self, row: InProgress) -> Request:
        turn = len(row.turns) + sum(len(sample.turns) for sample in row.samples)
        (seed,) = self._draws.of([row.episode]).seeds(turn)
        return Request([*row.prompt, *row.ids], seed, row.room_in_turn)


def _all_together(rows: Sequence[InProgress], turns: _Turns, partner: Partner) -> None:
    running = list(rows)
    with replies_of(partner, len(rows)) as replies:
        while running:
            for row, turn in zip(running, turns.of(running), strict=True):
                replies.ask(row.episode, turn)
            answers = replies.take(at_least=len(running))
            running = [rows[episode] for episode, reply in answers if rows[episode].hear(reply)]


_BEGIN = Turn([], False)
"""In the place of the turn before the first one."""


class _GoingOn:
    """Has a turn answered, and samples the next one, in the thread that waited for the answer.

    Args:
        rows: the episodes. turns: samples. partner: answers.

    Attributes:
        next: the turn that was sampled after an answer, by episode.
    """

    def __init__(self, rows: Sequence[InProgress], turns: _Turns, partner: Partner) -> None:
        self.rows, self._turns, self._partner = rows, turns, partner
        self.next: dict[int, Turn] = {}

    def reply(self, episode: int, turn: Turn) -> Reply:
        """Whether the episode is over after this turn."""
        row = self.rows[episode]
        if turn is not _BEGIN and not row.hear(self._partner.reply(episode, turn)):
            return Reply(over=True)
        (self.next[episode],) = self._turns.of([row])
        return Reply()


def _each_by_itself(rows: Sequence[InProgress], turns: _Turns, partner: Partner) -> None:
    going_on = _GoingOn(rows, turns, partner)
    with replies_of(going_on, len(rows)) as replies:
        for row in rows:
            replies.ask(row.episode, _BEGIN)
        while replies.due:
            for episode, reply in replies.take(at_least=1):
                if not reply.over:
                    replies.ask(episode, going_on.next.pop(episode))

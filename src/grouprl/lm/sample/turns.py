"""Episodes of several turns, in tokens: what a sampler is told after each turn, and what it gives back.

An episode is a prompt, then turns of the model and of its *partner* (tools, an environment) one after the other. Tokens
are only ever appended: what the partner says is read into the row that is being sampled, and nothing is rendered or
tokenised twice. Where the partner rewrites the history instead, a new *sample* begins, with a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """What the model wrote in one turn.

    Attributes:
        ids: the sampled token ids, at least one. They include the token that ended the turn if one did.
        finished: True if the model ended the turn, False if a budget of tokens cut it off.
        stopped: True if it ended with a stop string, and not with an end token.
    """

    ids: list[int]
    finished: bool
    stopped: bool = False

    @property
    def closed(self) -> bool:
        """Whether the last token is an end token."""
        return self.finished and not self.stopped


@dataclass(frozen=True)
class Reply:
    """What the partner answers to a turn.

    Attributes:
        ids: the token ids to append before the model's next turn, the opening of that turn included. With ``anew`` they
            are the whole new prompt instead.
        over: True if the episode ends here. Then ``ids`` is empty.
        anew: True if the history is rewritten: the next turn begins a new sample, whose prompt is ``ids``.
    """

    ids: Sequence[int] = ()
    over: bool = False
    anew: bool = False


class Partner(Protocol):
    """The other side of the episodes that are sampled together."""

    def reply(self, episode: int, turn: Turn) -> Reply:
        """Answer a turn of an episode.

        The sampler calls this from several threads at once, for each episode one call at a time. It may take long: the
        sampler goes on with other episodes meanwhile. It must not raise; what goes wrong in a tool or an environment is
        a reply too, and an error of the user's program is kept and raised after sampling.
        """


@dataclass(frozen=True)
class Sampled:
    """One sample of an episode: a prompt and all that follows it, the model's tokens and its partner's.

    Attributes:
        prompt: the token ids of the prompt.
        ids: the ``n`` token ids after the prompt, to the end of the model's last turn.
        turns: ``(start, stop)`` of each turn of the model in ``ids``. The tokens outside are the partner's.
        logp: ``[m]`` float32, on the CPU. The log-probability in nats of each of the model's m tokens, turn after turn,
            under the distribution from which it was drawn.
        finished: for each turn, whether the model ended it with an end token.
    """

    prompt: list[int]
    ids: list[int]
    turns: list[tuple[int, int]]
    logp: Tensor
    finished: list[bool]

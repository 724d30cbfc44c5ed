"""The one interface behind tools, environments of TRL's shape and text environments: the other side of an episode."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from grouprl.errors import UsageError

Message = Mapping[str, Any]
"""A message of a conversation: ``role``, ``content``, and what else the chat template knows (``tool_calls``, ...)."""


@dataclass(frozen=True)
class Said:
    """What the model said in a turn.

    Attributes:
        text: the decoded turn, without the token that ended it.
        finished: False if a budget of tokens cut the turn off.
        message: the turn as it stands in the conversation, with ``tool_calls`` if it has some. Default: the text alone.
        fault: what is wrong with something that was meant as a tool call, for the model to read; None if nothing is.
    """

    text: str
    finished: bool
    message: Message = field(default_factory=dict)
    fault: str | None = None

    def __post_init__(self) -> None:
        if not self.message:
            object.__setattr__(self, "message", {"role": "assistant", "content": self.text})


@dataclass(frozen=True)
class Answer:
    """What the other side does with a turn.

    Attributes:
        messages: what it says: text, which becomes one message of ``role``; messages; or None for nothing.
        reward: the reward of the turn. terminated: the episode is over by its own rules. truncated: it was cut.
        anew: ``messages`` are a whole new prompt, in the place of the conversation so far.
        state: identifies the state in which the turn was taken, for estimators that compare turns in equal states.
        metrics: numbers of this turn by name, such as ``tools/calls``; they are summed over the episode.
    """

    messages: str | Sequence[Message] | None = None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    anew: bool = False
    state: Hashable | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Interaction(Protocol):
    """The other side of one episode. One object plays one episode after the other, each begun by :meth:`begin`.

    Attributes:
        tools: JSON schemas of the functions that the model may call in the episode that has begun.
        gives_rewards: whether the rewards of its answers mean anything.
        keeps_time: whether it limits the time of what it calls itself. If not, an answer that takes too long ends the
            episode, and another object takes its place.
        counted: the metrics that every episode has: 0, plus what its answers say. A metric that is in few answers needs
            this, because its mean over several steps leaves out the steps that do not have it.
        reads: the columns of the row that ``begin`` reads, so that a column which nobody reads is warned of; None if
            it may read any.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    gives_rewards: bool = True
    keeps_time: bool = False
    counted: Sequence[str] = ()
    reads: Sequence[str] | None = None

    def begin(self, row: Mapping[str, Any], seed: int) -> Sequence[Message] | str:
        """Start an episode. Returns the first prompt, messages or text.

        Args:
            row: the row of the dataset, its ``prompt`` among it; empty if there is no dataset.
            seed: equal for all members of a group, so that they start equal.
        """

    def answer(self, said: Said) -> Answer:
        """React to a turn of the model. Called from any thread, never twice at once for one object."""

    def close(self) -> None:
        """Release what the object holds."""


def in_use(factory: str, made: object) -> UsageError:
    """The error for a factory, called ``factory``, that returned an object in which another episode is played."""
    return UsageError(
        f"{factory} returned a {type(made).__name__} that is in use already; episodes run side by side, so return a "
        "new object each time"
    )

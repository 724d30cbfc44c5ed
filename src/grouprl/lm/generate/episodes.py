"""Episodes as they were played: what sampling and the other side give, and samples to learn from are made of."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from grouprl.lm.agents.interaction import Message
from grouprl.lm.prompts import Prompt
from grouprl.lm.sample.turns import Sampled


@dataclass(frozen=True)
class Episode:
    """One episode that was played.

    Attributes:
        start: the prompt that it began with. group: which start, counted from 0: members of a group may be compared.
        samples: one, or several if the history was rewritten; their turns one after the other are those of the episode.
        rewards: the reward of each turn; what a reward function gives for the whole episode is added to the last.
        terminated: it ended by its own rules. truncated: it was cut, by a budget or by the other side.
        states: identifies the state of each turn, or None where there is none.
        messages: the conversation as the model saw it, for reading and for reward functions.
        metrics: sums over its turns.
    """

    start: Prompt
    group: int
    samples: Sequence[Sampled]
    rewards: Sequence[float]
    terminated: bool
    truncated: bool
    states: Sequence[Hashable | None]
    messages: Sequence[Message]
    metrics: Mapping[str, float] = field(default_factory=dict)

"""How an environment is played in words: what is said of an observation, and which action a text means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Words:
    """The words of one environment.

    Attributes:
        rules: what the game is, and how to name an action.
        how_to_act: how to name an action; what a text that names none is answered with.
        say: an observation as text.
        parse: the action that a text means, or None if it means none.
        masks: what gives the mask of the present state, or None if only ``info["action_mask"]`` may.
        allowed: the actions that a mask allows, in words, or None where there are no masks.
        is_allowed: whether a mask allows an action.
        random: an action that is drawn with a seed, or None where none can be drawn.
        names: the names of a Discrete space's actions, if they have names.
        success: the return from which on an episode counts as solved.
    """

    rules: str
    how_to_act: str
    say: Callable[[Any], Any]
    parse: Callable[[str], Any]
    masks: Callable[[], Any] | None = None
    allowed: Callable[[Any], str] | None = None
    is_allowed: Callable[[Any, Any], bool] | None = None
    random: Callable[[int], Any] | None = None
    names: tuple[str, ...] | None = None
    success: float = 1.0


def chosen(text: str, names: Sequence[str]) -> int | None:
    """The place of the action that ``text`` names, or None if it names none.

    A whole reply may be a name, its first letter where no other name begins with it, or its number. In a longer reply
    the first name counts, and if there is none the first number.

    >>> chosen("I go down.", ["left", "down"]), chosen("L", ["left", "down"]), chosen("1", ["left", "down"])
    (1, 0, 1)
    """
    said = text.strip().strip(".!\"'`").lower()
    letters = [name[0] for name in names]
    for i, name in enumerate(names):
        if said in (name, str(i)) or (said == name[0] and letters.count(said) == 1):
            return i
    words = re.findall(r"[a-z]+", said)
    found = [(words.index(name), i) for i, name in enumerate(names) if name in words]
    if found:
        return min(found)[1]
    number = re.search(r"\d+", said)
    return int(number[0]) if number is not None and int(number[0]) < len(names) else None


def listed(names: Sequence[str]) -> str:
    """Actions with their first letters where these are unique: "L (left), D (down)"."""
    letters = [name[0] for name in names]
    return ", ".join(
        f"{name[0].upper()} ({name})" if letters.count(name[0]) == 1 else name for name in names
    )  # fmt: skip

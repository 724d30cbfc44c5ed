"""Reverse and sort: short strings to be put into another order, for small models that learn from nothing.

An answer that is right in all places is beyond the reach of a model that knows nothing, so each place earns its share.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grouprl.lm.tasks.parsing import bare
from grouprl.lm.tasks.task import RESULT_ONLY, Example, Task, check_option


@dataclass(frozen=True)
class _Strings(Task):
    """`length` characters, each drawn on its own from `alphabet`."""

    length: int = 6

    alphabet = ""
    instruction = ""
    system = RESULT_ONLY

    def __post_init__(self) -> None:
        check_option(self.name, "length", self.length, 2, 32)

    @property
    def max_completion_length(self) -> int:
        """A token for each character, one for the end, one to go wrong with."""
        return self.length + 2

    @abstractmethod
    def solve(self, characters: str) -> str:
        """The right answer."""

    def draw(self, rng: random.Random) -> Example:
        """An example of either split; its text is the characters alone."""
        characters = "".join(rng.choice(self.alphabet) for _ in range(self.length))
        return Example(f"{self.instruction}: {characters}", self.solve(characters), text=characters)

    def parse(self, text: str) -> str | None:
        """The reply without quotes, white space and full stop; None if nothing is left."""
        return bare(text) or None

    def score(self, reply: str, row: Mapping[str, Any]) -> float:
        """The share of places that are right, of the longer of reply and answer: 1 only for the answer itself."""
        given, answer = self.parse(reply) or "", str(row["answer"])
        return sum(a == b for a, b in zip(given, answer, strict=False)) / max(len(given), len(answer))


@dataclass(frozen=True)
class Reverse(_Strings):
    """`length` letters from a to p, backwards."""

    name = "reverse"
    alphabet = "abcdefghijklmnop"
    instruction = "Reverse the letters"
    shots = (("Reverse the letters: kfbaoe", "eoabfk"), ("Reverse the letters: chmpge", "egpmhc"))

    def solve(self, characters: str) -> str:
        """The characters from last to first."""
        return characters[::-1]


@dataclass(frozen=True)
class Sort(_Strings):
    """`length` digits, smallest first."""

    name = "sort"
    alphabet = "0123456789"
    instruction = "Sort the digits from small to large"
    shots = (
        ("Sort the digits from small to large: 730158", "013578"),
        ("Sort the digits from small to large: 926442", "224469"),
    )

    def solve(self, characters: str) -> str:
        """The characters in order."""
        return "".join(sorted(characters))

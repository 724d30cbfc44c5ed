"""A game in text that ships: to try things out, and for tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from grouprl.errors import UsageError


class GuessNumber:
    """Find a secret digit: each guess is answered by ``higher``, ``lower`` or ``found``.

    An environment with Gymnasium's interface on text. The reward is 1 for the right guess, and the episode ends with
    it or after ``guesses`` of them. What is no digit counts as a guess and is answered by ``?``.

    Args:
        guesses: how many there are. With four, halving finds each of the ten digits.
        digits: the secret is one of the first so many.
        terse: say the first letters of the words alone, for models of characters.
    """

    def __init__(self, guesses: int = 4, digits: int = 10, terse: bool = False) -> None:
        if guesses < 1 or not 1 <= digits <= 10:
            raise UsageError(f"GuessNumber needs guesses >= 1 and digits from 1 to 10, got {guesses} and {digits}")
        self._guesses, self._digits, self._terse = guesses, digits, terse
        self._secret = self._left = 0

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Draw a secret, or take ``options["secret"]``."""
        drawn = random.Random(seed).randrange(self._digits)
        self._secret, self._left = int((options or {}).get("secret", drawn)), self._guesses
        return self._said("guess"), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Compare a guess with the secret."""
        self._left -= 1
        guess = action.strip()[:1]
        if not ("0" <= guess <= "9"):
            return "?", 0.0, self._left == 0, False, {}
        right = int(guess) == self._secret
        answer = "found" if right else "higher" if self._secret > int(guess) else "lower"
        return self._said(answer), float(right), right or self._left == 0, False, {}

    def _said(self, word: str) -> str:
        return word[0] if self._terse else word


GAMES: dict[str, Callable[..., Any]] = {"guess-number": GuessNumber}
"""The games by the names that :func:`~grouprl.lm.agents.environments.text_environment` knows."""

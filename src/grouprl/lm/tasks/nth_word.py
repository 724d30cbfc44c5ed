"""Nth word: pick a word of a short list by its position."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grouprl.errors import UsageError
from grouprl.lm.tasks.parsing import bare
from grouprl.lm.tasks.task import RESULT_ONLY, Example, Split, Task, check_option
from grouprl.lm.tasks.words import EVAL_WORDS, TRAIN_WORDS

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def _question(words: list[str], position: int) -> str:
    return f"Words: {', '.join(words)}. What is the {_ORDINALS[position]} word?"


@dataclass(frozen=True)
class NthWord(Task):
    """Lists of `n_words` words; the words of the eval split occur in no question of the train split."""

    n_words: int = 4

    name = "nth-word"
    max_completion_length = 6
    system = RESULT_ONLY
    shots = (
        (_question(["bread", "ship", "moon", "lamp"], 2), "moon"),
        (_question(["goat", "river", "coin", "leaf"], 0), "goat"),
    )

    def __post_init__(self) -> None:
        check_option(self.name, "n_words", self.n_words, 2, len(_ORDINALS))

    def draw(self, rng: random.Random) -> Example:
        """An example of the train split."""
        return self._draw(rng, TRAIN_WORDS)

    def generate(self, rng: random.Random, split: Split) -> Example:
        """An example from the words of `split`. Raises UsageError for another split."""
        if split not in ("train", "eval"):
            raise UsageError(f"split must be 'train' or 'eval', got {split!r}.")
        return self._draw(rng, EVAL_WORDS if split == "eval" else TRAIN_WORDS)

    def parse(self, text: str) -> str | None:
        """The reply without quotes, white space and full stop; None if nothing is left."""
        return bare(text) or None

    def _draw(self, rng: random.Random, words: tuple[str, ...]) -> Example:
        chosen = rng.sample(words, self.n_words)
        position = rng.randrange(self.n_words)
        return Example(_question(chosen, position), chosen[position])

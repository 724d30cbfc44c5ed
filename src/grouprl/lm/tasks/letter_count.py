"""Letter count: how often a letter occurs in a few words."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from grouprl.lm.tasks.parsing import last_integer
from grouprl.lm.tasks.task import RESULT_ONLY, Example, Task, check_option
from grouprl.lm.tasks.words import EVAL_WORDS, TRAIN_WORDS

_MAX_COUNT = 3


def _question(letter: str, words: str) -> str:
    return f'How many times does the letter "{letter}" occur in "{words}"?'


@dataclass(frozen=True)
class LetterCount(Task):
    """`n_words` words and a letter that occurs in them 0 to 3 times, each number as often as the others."""

    n_words: int = 2

    name = "letter-count"
    max_completion_length = 8
    system = RESULT_ONLY
    shots = ((_question("o", "door stone"), "3"), (_question("u", "bird wall"), "0"))

    def __post_init__(self) -> None:
        check_option(self.name, "n_words", self.n_words, 2, 8)

    def draw(self, rng: random.Random) -> Example:
        """An example of either split."""
        count = rng.randint(0, _MAX_COUNT)  # first, or saying "1" would be right half the time
        while True:
            # In order, so that the same words are the same question: the splits are told apart by it.
            words = " ".join(sorted(rng.sample(TRAIN_WORDS + EVAL_WORDS, self.n_words)))
            letters = [letter for letter in string.ascii_lowercase if words.count(letter) == count]
            if letters:
                return Example(_question(rng.choice(letters), words), str(count))

    def parse(self, text: str) -> str | None:
        """The last integer of the reply."""
        return last_integer(text)

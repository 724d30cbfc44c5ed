"""Countdown: combine all the given numbers with + - * / to reach a target."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grouprl.lm.tasks.expression import read_expression
from grouprl.lm.tasks.parsing import bare, tagged
from grouprl.lm.tasks.task import Example, Task, check_option

_MAX_NUMBER = 25
_MAX_TARGET = 100
_RIGHT_NUMBERS = 0.1


def _question(numbers: list[int], target: int) -> str:
    listed = ", ".join(map(str, numbers))
    return f"Use each of the numbers {listed} exactly once, with + - * / and brackets, to reach {target}."


@dataclass(frozen=True)
class Countdown(Task):
    """`n_numbers` numbers from 1 to 25, a target from 1 to 100; every puzzle has a solution."""

    n_numbers: int = 3

    name = "countdown"
    system = "You answer with one expression only."
    shots = ((_question([2, 5, 9], 43), "5 * 9 - 2"), (_question([4, 6, 10], 16), "(10 - 6) * 4"))
    needs = ("numbers", "target")

    def __post_init__(self) -> None:
        check_option(self.name, "n_numbers", self.n_numbers, 2, 6)

    @property
    def max_completion_length(self) -> int:
        """Room for the numbers, the operations and some brackets, but for no reasoning."""
        return 8 * self.n_numbers

    def draw(self, rng: random.Random) -> Example:
        """An example of either split; its answer is one solution of several. Columns: numbers, target."""
        while True:
            # In order, so that the same puzzle is the same question: the splits are told apart by it.
            numbers = sorted(rng.randint(1, _MAX_NUMBER) for _ in range(self.n_numbers))
            target, solution = _combine(numbers, rng)
            if 1 <= target <= _MAX_TARGET:
                columns = {"numbers": numbers, "target": target}
                return Example(_question(numbers, target), solution, columns=columns)

    def parse(self, text: str) -> str | None:
        """The expression: inside <answer>, else the last line that is not empty; what an = leads to is left out."""
        inside = tagged(text)
        lines = [line for line in (text if inside is None else inside).splitlines() if line.strip()]
        return (bare(lines[-1].split("=")[0]) or None) if lines else None

    def score(self, reply: str, row: Mapping[str, Any]) -> float:
        """1 for a solution, 0.1 for an expression of exactly the given numbers, else 0."""
        expression = read_expression(self.parse(reply) or "")
        if expression is None or Counter(expression.numbers) != Counter(row["numbers"]):
            return 0.0
        return 1.0 if expression.value == row["target"] else _RIGHT_NUMBERS


def _combine(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """A positive integer that `numbers` can reach, and how: two random ones are combined until one is left."""
    pool = [(number, str(number)) for number in numbers]
    while len(pool) > 1:
        rng.shuffle(pool)
        (a, left), (b, right) = sorted((pool.pop(), pool.pop()), reverse=True)
        options = [(a + b, "+"), (a * b, "*")]
        if a > b:
            options.append((a - b, "-"))
        if a % b == 0:
            options.append((a // b, "/"))
        value, operator = rng.choice(options)
        pool.append((value, f"{_bracketed(left)} {operator} {_bracketed(right)}"))
    return pool[0]


def _bracketed(expression: str) -> str:
    return f"({expression})" if " " in expression else expression

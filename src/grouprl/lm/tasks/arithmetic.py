"""Arithmetic: one sum, difference or product of small numbers, asked without examples."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grouprl.errors import UsageError
from grouprl.lm.tasks.parsing import last_integer
from grouprl.lm.tasks.task import RESULT_ONLY, Example, Task


@dataclass(frozen=True)
class Arithmetic(Task):
    """a + b with 2..50, a - b with 10..60 and 2..9, a x b with 2..12; `operations` says which."""

    operations: str = "+-*"

    name = "arithmetic"
    max_completion_length = 16
    system = RESULT_ONLY

    def __post_init__(self) -> None:
        if not isinstance(self.operations, str) or not self.operations or set(self.operations) - set("+-*"):
            raise UsageError(f"task {self.name}: operations must be some of + - *, got {self.operations!r}.")

    def draw(self, rng: random.Random) -> Example:
        """An example of either split."""
        operation = rng.choice(self.operations)
        if operation == "+":
            a, b = rng.randint(2, 50), rng.randint(2, 50)
            result = a + b
        elif operation == "-":
            a, b = rng.randint(10, 60), rng.randint(2, 9)
            result = a - b
        else:
            a, b = rng.randint(2, 12), rng.randint(2, 12)
            result = a * b
        sign = "x" if operation == "*" else operation
        return Example(f"What is {a} {sign} {b}?", str(result), text=f"{a}{operation}{b}")

    def parse(self, text: str) -> str | None:
        """The last integer of the reply, whatever stands before it."""
        return last_integer(text)

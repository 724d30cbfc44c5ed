"""Arithmetic with numbers of several digits: more than a small model computes in its head."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.tasks.parsing import last_integer
from grouprl.lm.tasks.task import RESULT_ONLY, Example, Task, check_option

_SHOWN = ((12, 7), (345, 21))
"""What is multiplied in the examples; no question of at least two digits on both sides is one of them."""


@dataclass(frozen=True)
class MultiDigit(Task):
    """a + b, a - b or a * b with numbers of ``digits`` digits; `operations` says which. The larger one stands first.

    `tool` names a tool that computes, ``multiply(a, b)`` or ``calculate(expression)``. Then the conversation begins
    with two examples in which it is called: a small model calls no tool that it has only been told of.
    """

    digits: int = 3
    operations: str = "+-*"
    tool: str | None = None

    name = "multi-digit"
    max_completion_length = 24
    system = RESULT_ONLY

    def __post_init__(self) -> None:
        check_option(self.name, "digits", self.digits, 2, 6)
        if self.tool not in (None, "multiply", "calculate"):
            raise UsageError(f"task {self.name}: tool must be 'multiply' or 'calculate', got {self.tool!r}.")
        if self.tool == "multiply" and self.operations != "*":
            raise UsageError(f"task {self.name}: the tool multiply needs operations='*', got {self.operations!r}.")
        if not isinstance(self.operations, str) or not self.operations or set(self.operations) - set("+-*"):
            raise UsageError(f"task {self.name}: operations must be some of + - *, got {self.operations!r}.")

    def draw(self, rng: random.Random) -> Example:
        """An example of either split."""
        operation = rng.choice(self.operations)
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        b, a = sorted((rng.randint(low, high), rng.randint(low, high)))
        result = {"+": a + b, "-": a - b, "*": a * b}[operation]
        return Example(f"What is {a} {operation} {b}?", str(result), text=f"{a}{operation}{b}")

    def messages(self, example: Example) -> list[dict[str, Any]]:
        """The conversation that asks `example`, behind examples of calls if there is a tool."""
        asked: list[dict[str, Any]] = [*super().messages(example)]
        if self.tool is None:
            return asked
        return [*(message for a, b in _SHOWN for message in self._solved(a, b)), asked[-1]]

    def _solved(self, a: int, b: int) -> list[dict[str, Any]]:
        """A question, the call that answers it, its result, and the answer."""
        arguments = {"a": a, "b": b} if self.tool == "multiply" else {"expression": f"{a} * {b}"}
        call: dict[str, Any] = {"type": "function", "function": {"name": self.tool, "arguments": arguments}}
        return [
            {"role": "user", "content": f"What is {a} * {b}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": self.tool, "content": str(a * b)},
            {"role": "assistant", "content": str(a * b)},
        ]

    def parse(self, text: str) -> str | None:
        """The last integer of the reply, whatever stands before it."""
        return last_integer(text)

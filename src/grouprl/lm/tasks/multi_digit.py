"""Arithmetic with numbers of several digits: more than a small model computes in its head."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.tasks.parsing import last_integer
from grouprl.lm.tasks.task import RESULT_ONLY, Example, Task, check_option


@dataclass(frozen=True)
class MultiDigit(Task):
    """a + b, a - b or a x b with numbers of ``digits`` digits; `operations` says which. The larger one stands first.

    `tool` names a tool that computes: then the conversation begins with an example in which it is called.
    """

    digits: int = 3
    operations: str = "+-*"
    tool: str | None = None

    name = "multi-digit"
    about = "What is 482 x 731?; 1 if the last integer of the reply is the result"
    max_completion_length = 24
    system = RESULT_ONLY

    def __post_init__(self) -> None:
        check_option(self.name, "digits", self.digits, 2, 6)
        if self.tool is not None and not (isinstance(self.tool, str) and self.tool.isidentifier()):
            raise UsageError(f"task {self.name}: tool must be the name of a function, got {self.tool!r}.")
        if not isinstance(self.operations, str) or not self.operations or set(self.operations) - set("+-*"):
            raise UsageError(f"task {self.name}: operations must be some of + - *, got {self.operations!r}.")

    def draw(self, rng: random.Random) -> Example:
        """An example of either split."""
        operation = rng.choice(self.operations)
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        b, a = sorted((rng.randint(low, high), rng.randint(low, high)))
        result = {"+": a + b, "-": a - b, "*": a * b}[operation]
        sign = "x" if operation == "*" else operation
        return Example(f"What is {a} {sign} {b}?", str(result), text=f"{a}{operation}{b}")

    def messages(self, example: Example) -> list[dict[str, Any]]:
        """The conversation that asks `example`, behind an example of a call if there is a tool."""
        asked: list[dict[str, Any]] = [*super().messages(example)]
        if self.tool is None:
            return asked
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": self.tool, "arguments": {"expression": "12 * 34"}},
        }
        shown: list[dict[str, Any]] = [
            {"role": "user", "content": "What is 12 x 34?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": self.tool, "content": "408"},
            {"role": "assistant", "content": "408"},
        ]
        return [*asked[:-1], *shown, asked[-1]]

    def parse(self, text: str) -> str | None:
        """The last integer of the reply, whatever stands before it."""
        return last_integer(text)

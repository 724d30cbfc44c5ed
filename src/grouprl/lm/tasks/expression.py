"""Arithmetic expressions read with a grammar of their own: numbers, + - * /, brackets. No name, no power, no eval."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DIGITS = 9
MAX_DEPTH = 20

_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "\u2212": "-", "[": "(", "]": ")"})


@dataclass(frozen=True)
class Expression:
    """The value of an expression, exact, and the numbers it is made of, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def read_expression(text: str) -> Expression | None:
    """The value of `text`; None if it is no expression, divides by zero, or is longer or deeper than the limits above.

    sum = product {("+" | "-") product};  product = factor {("*" | "/") factor};  factor = number | "(" sum ")"
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = text.translate(_SPELLINGS)
    tokens = _TOKEN.findall(text)
    if len("".join(tokens)) != len("".join(text.split())):  # something else stands between the tokens
        return None
    reader = _Reader(tokens)
    try:
        value = reader.sum(depth=0)
    except (_NoExpressionError, ZeroDivisionError):
        return None
    return Expression(value, tuple(reader.numbers)) if reader.at_end else None


class _NoExpressionError(Exception):
    """The text does not follow the grammar."""


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0
        self.numbers: list[int] = []

    @property
    def at_end(self) -> bool:
        return self._next == len(self._tokens)

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while operator := self._take("+", "-"):
            value = value + self._product(depth) if operator == "+" else value - self._product(depth)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._factor(depth)
        while operator := self._take("*", "/"):
            value = value * self._factor(depth) if operator == "*" else value / self._factor(depth)
        return value

    def _factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH or self.at_end:
            raise _NoExpressionError
        if self._take("("):
            value = self.sum(depth + 1)
            if not self._take(")"):
                raise _NoExpressionError
            return value
        token = self._tokens[self._next]
        if not token.isdigit() or len(token) > MAX_DIGITS:
            raise _NoExpressionError
        self._next += 1
        self.numbers.append(int(token))
        return Fraction(self.numbers[-1])

    def _take(self, *wanted: str) -> str:
        if self.at_end or self._tokens[self._next] not in wanted:
            return ""
        self._next += 1
        return self._tokens[self._next - 1]

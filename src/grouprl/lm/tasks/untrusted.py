"""Which replies may be handed to a scorer that evaluates them as Python.

Some scorers of reasoning-gym pass the reply to eval() or to sympy's parse_expr, which evaluates too. A reply may reach
them only if it is of a shape that can neither run anything nor compute for ever.
"""

from __future__ import annotations

import ast
import re

_MAX_CHARACTERS = 1000
_PLAIN = re.compile(r"[\w\s.]*")  # words and numbers side by side: nothing is called, nothing computed
_FUNCTIONS = "sin cos tan sec csc cot sinh cosh tanh asin acos atan asinh acosh atanh exp log ln sqrt pi Abs"
_SUM = re.compile(r"[0-9+\-*/(). \t]*")
_ALGEBRA = re.compile(r"[0-9A-Za-z+\-*/(), .\t]*")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_ATTRIBUTE = re.compile(r"[A-Za-z)]\s*\.|\.\s*[A-Za-z]")
_SMALL_NUMBER = r"[0-9]{1,2}(?![0-9.])"
_EXPONENTS = (
    _SMALL_NUMBER,
    rf"\(\s*-?\s*{_SMALL_NUMBER}(?:\s*/\s*{_SMALL_NUMBER})?\s*\)",
    r"[A-Za-z]\b",
    rf"\(\s*-?\s*(?:{_SMALL_NUMBER}\s*\*\s*)?[A-Za-z]\s*\)",
)
_SMALL_POWER = re.compile(rf"\*\*\s*(?:{'|'.join(_EXPONENTS)})(?!\s*\*\*)")
_POWER_OF_GROUP = re.compile(r"\)\s*\*\*")
_DIGITS = re.compile(r"[0-9.]{16,}")


def is_literal(text: str) -> bool:
    """Whether `text` is a Python literal such as [[1, 0], [0, 1]], or words and numbers without any sign."""
    if len(text) > _MAX_CHARACTERS:
        return False
    if _PLAIN.fullmatch(text):
        return True
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def is_sum(text: str) -> bool:
    """Whether `text` is made of numbers, + - * / and brackets alone, without a power."""
    return len(text) <= _MAX_CHARACTERS and "**" not in text and "//" not in text and bool(_SUM.fullmatch(text))


def is_algebra(text: str) -> bool:
    """Whether `text` is made of numbers, one-letter variables, well-known functions, + - * /, and small powers."""
    return (
        len(text) <= _MAX_CHARACTERS
        and bool(_ALGEBRA.fullmatch(text))
        and not _ATTRIBUTE.search(text)
        and not _DIGITS.search(text)
        and all(len(name) == 1 or name in _FUNCTIONS.split() for name in _NAME.findall(text))
        and text.count("**") == len(_SMALL_POWER.findall(text))
        and len(_POWER_OF_GROUP.findall(text)) <= 2
    )

"""Calculators that a model can call; `multiply` is the tool of the preset ``calculator``."""

from __future__ import annotations

from grouprl.lm.tasks.expression import MAX_CHARACTERS, MAX_DIGITS, read_expression


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def calculate(expression: str) -> str:
    """Compute the value of an arithmetic expression.

    Args:
        expression: Numbers, + - * / and brackets, such as 12 * (34 + 5).
    """
    read = read_expression(str(expression).replace("x", "*").strip().rstrip("=").strip())
    if read is None:
        raise ValueError(
            f"this is no expression of whole numbers of at most {MAX_DIGITS} digits, + - * / and brackets, "
            f"at most {MAX_CHARACTERS} characters long"
        )
    value = read.value
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"

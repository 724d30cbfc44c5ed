"""The calculator that a model can call."""

import pytest

from grouprl.lm.agents.calculator import calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [("482 * 731", "352342"), ("482 x 731 =", "352342"), ("12 - (3 + 4)", "5"), ("7 / 2", "3.5"), (" 5 ", "5")],
)
def test_it_computes_expressions(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["", "2 ** 9", "__import__('os')", "1 / 0", "9" * 10, "(" * 99])
def test_it_says_what_it_cannot_compute(expression):
    with pytest.raises(ValueError, match="no expression of whole numbers"):
        calculate(expression)

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grouprl.lm.tasks.expression import read_expression


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("10 - 3 - 2", 5),
        ("12 / 3 / 2", 2),
        ("7 / 2", Fraction(7, 2)),
        ("1/3 + 1/3 + 1/3", 1),
        ("2*(3+(4-1))", 12),
        ("6 × 2 ÷ 3 − 1", 3),
        ("[2 + 3] * 4", 20),
        (" 007\t+ 1 ", 8),
    ],
)
def test_the_value_follows_the_usual_rules(text, value):
    assert read_expression(text).value == value


def test_the_numbers_are_listed_in_order_and_each_time_they_occur():
    assert read_expression("5 * (12 - 5) + 0").numbers == (5, 12, 5, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1 +",
        "+ 1",
        "-1 + 2",
        "1 2",
        "1 + + 2",
        "(1",
        "1)",
        "()",
        ")(",
        "1 / 0",
        "1 / (2 - 2)",
        "2 ** 3",
        "9**9**9",
        "7 // 2",
        "7 % 2",
        "2 ^ 3",
        "1.5 + 1",
        "1e5",
        "0x10",
        "1_000",
        "x + 1",
        "3!",
        "1 = 1",
        "1, 2",
        "abs(1)",
        "__import__('os')",
        "__import__('os').system('true')",
        "().__class__",
        "lambda: 1",
        "\u0661 + \u0662",  # digits of another script
        "1234567890",
        "(" * 21 + "1" + ")" * 21,
        "(" * 100_000,
        "1+" * 100 + "1",
    ],
)
def test_what_is_no_expression_is_none(text):
    assert read_expression(text) is None


def test_the_limits_themselves_are_allowed():
    assert read_expression("999999999").value == 999_999_999
    assert read_expression("(" * 20 + "1" + ")" * 20).value == 1
    assert read_expression("1+" * 99 + "11").value == 110


@given(st.recursive(st.integers(0, 99), lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner), max_leaves=6))
@settings(deadline=None)
def test_a_written_tree_is_read_back_with_its_value(tree):
    def write(node):
        return str(node) if isinstance(node, int) else f"({write(node[0])} {node[1]} {write(node[2])})"

    def value(node):
        if isinstance(node, int):
            return node
        a, b = value(node[0]), value(node[2])
        return {"+": a + b, "-": a - b, "*": a * b}[node[1]]

    assert read_expression(write(tree)).value == value(tree)


@given(st.text("0123456789+-*/() ", max_size=30))
@settings(deadline=None, max_examples=300)
def test_any_text_of_these_characters_is_read_or_refused_but_never_fails(text):
    result = read_expression(text)
    assert result is None or isinstance(result.value, Fraction)

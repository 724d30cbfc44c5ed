import pytest

from grouprl.lm.tasks.parsing import bare, last_integer, tagged


@pytest.mark.parametrize(
    ("text", "integer"),
    [
        ("5", "5"),
        ("The answer is 14.", "14"),
        ("7 + 7 = 14", "14"),
        ("14\n\nIn mathematics,", "14"),
        ("1,234", "1234"),
        ("1,234,567.", "1234567"),
        ("$1,234.00", "1234"),
        ("1,2,3", "3"),
        ("12,13", "13"),
        ("1,2345", "2345"),
        ("5.0", "5"),
        ("3.5", None),
        ("17 or 3.5", "17"),
        ("version 1.2.3", None),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("= -1,000", "-1000"),
        ("12-5", "5"),
        ("12 - 5", "5"),
        ("007", "7"),
        ("000", "0"),
        ("-0", "0"),
        ("\\boxed{42}", "42"),
        ("**42**", "42"),
        ("x=42kg", "42"),
        ("none", None),
        ("", None),
        ("-", None),
        (".", None),
        ("\u0664\u0662", None),
    ],
)
def test_the_last_integer_is_found(text, integer):
    assert last_integer(text) == integer


def test_a_numeral_of_any_length_is_read():
    assert last_integer("1" * 100_000) == "1" * 100_000  # int() would refuse it


def test_bare_takes_off_what_surrounds_a_word():
    assert bare(" 'moon.' ") == "moon"
    assert bare("`moon`.") == "moon"
    assert bare("it's") == "it's"
    assert bare('" . "') == ""


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<answer> 5 </answer>", "5"),
        ("a<answer>5</answer>b", "5"),
        ("<answer>4</answer> no: <answer>5\n6</answer>", "5\n6"),
        ("<answer>4</answer> and <answer>5", "4"),
        ("<answer>4 <answer>5</answer>", "5"),
        ("<answer></answer>", ""),
        ("</answer>5<answer>", None),
        ("<answer>5", None),
        ("5</answer>", None),
        ("5", None),
        ("", None),
    ],
)
def test_tagged_is_the_inside_of_the_last_pair(text, inside):
    assert tagged(text) == inside


def test_a_long_run_of_open_tags_is_no_trouble():
    assert tagged("<answer>" * 100_000) is None
    assert last_integer("-," * 100_000) is None

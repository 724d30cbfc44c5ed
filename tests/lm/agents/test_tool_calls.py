"""Calls as text: what is read as one, and what the model is told where something is none."""

import json

import pytest

from grouprl.lm.agents.tool_calls import NotACallError, as_call, described, of_json, parse, without_thoughts
from grouprl.lm.agents.tools import schema_of
from grouprl.lm.messages import call_text


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


ADD = schema_of(add)
THREE_AND_FOUR = as_call("add", {"a": 3, "b": 4})


@pytest.mark.parametrize(
    "body",
    [
        "add(a=3, b=4)", "add(3, 4)", "add(3, b=4)", " add(a=3,b=4)\n",
        '{"name": "add", "arguments": {"a": 3, "b": 4}}', '{"name": "add", "parameters": {"a": 3, "b": 4}}',
        '[{"name": "add", "arguments": {"a": 3, "b": 4}}]',
        '{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 3, \\"b\\": 4}"}}',
    ],
)  # fmt: skip
def test_a_call_is_read_in_python_and_in_json(body: str) -> None:
    assert parse(f"I add. <tool_call>{body}</tool_call>", [ADD]) == ("I add.", [THREE_AND_FOUR])


def test_the_end_of_a_turn_ends_a_call_too() -> None:
    assert parse("<tool_call>add(3, 4)", [ADD]) == ("", [THREE_AND_FOUR])


def test_several_calls_come_in_their_order() -> None:
    text = "<tool_call>add(1, 2)</tool_call> and <tool_call>add(3, 4)</tool_call>"
    assert parse(text, [ADD]) == ("and", [as_call("add", {"a": 1, "b": 2}), THREE_AND_FOUR])


def test_text_without_a_call_is_text() -> None:
    assert parse("add(3, 4) is 7", [ADD]) == ("add(3, 4) is 7", [])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("add(3, 4", "cannot be read; write it as add(a=3, b=3)"),
        ("add", "cannot be read"),
        ("", "cannot be read"),
        ("add(open('x'))", "cannot be read"),
        ("__import__('os').system('x')", "cannot be read"),
        ("add(1, 2, 3)", "add takes 2 arguments and is given 3"),
        ("add(" * 500, "cannot be read"),
        ("a" * 200_000, "200000 characters"),
        ('{"name": "add"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"arguments": {}}', "no name with arguments"),
        ('{"name": "add", "arguments": 3}', "no name with arguments"),
        ("[3]", "no name with arguments"),
        ("[]", "the list [] holds no call; write one as add(a=3, b=3)"),
        ("add(1, a=2)", "the call of add gives 'a' twice; give it once"),
        ("add(a=1, a=2)", "the call of add gives 'a' twice"),
        ("add(**{'a': 1, 'b': 2})", "has **; write each argument as add(name=value)"),
        ('{"name": "add", "arguments": {"a": 1, "a": 2}}', "an object of the call gives 'a' twice"),
        ('{"name": "add", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}', "an object of the call gives 'a' twice"),
        ('{"name": "add", "arguments": {"a": NaN}}', "nan is no finite number"),
        ("add(1e999, 1)", "inf is no finite number"),
    ],
)
def test_what_is_no_call_is_said_in_a_line(body: str, said: str) -> None:
    with pytest.raises(NotACallError) as caught:
        parse(f"<tool_call>{body}</tool_call>", [ADD])
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "said", "thoughts"),
    [
        ("<think>\nadd\n</think>\n\n7", "7", "add"),
        ("<think>\n\n</think>\n\n7", "7", ""),
        ("Well. <think>a</think>7<think>b", "Well. 7", "a\nb"),
        ("<think><tool_call>add(3, 4)</tool_call>", "", "<tool_call>add(3, 4)</tool_call>"),
        ('<tool_call>say("<think>")</tool_call>', '<tool_call>say("<think>")</tool_call>', ""),
        (" 7</think> ", " 7</think> ", ""),
    ],
)
def test_thoughts_are_told_from_what_is_said(text: str, said: str, thoughts: str) -> None:
    assert without_thoughts(text) == (said, thoughts)


def test_a_call_is_written_as_it_is_read() -> None:
    assert call_text(THREE_AND_FOUR) == "<tool_call>add(a=3, b=4)</tool_call>"
    assert parse(call_text(as_call("add", {"a": "it's", "b": [None, 2.5]})), [ADD])[1][0]["function"]["arguments"] == {
        "a": "it's", "b": [None, 2.5],
    }  # fmt: skip


def test_the_model_is_told_names_parameters_and_one_call() -> None:
    assert described([ADD]).splitlines() == [
        "You can use this tool:",
        "add(a: integer, b: integer) - Add two numbers.",
        "  a: The first.",
        "  b: The second.",
        "To use it, write <tool_call>add(a=3, b=3)</tool_call> and stop. The result comes back to you. Then give the "
        "answer.",
    ]
    assert parse(described([ADD, ADD]), [ADD])[1] == [as_call("add", {"a": 3, "b": 3})]


def test_arguments_of_a_response_template_are_made_plain() -> None:
    assert of_json({"name": "add", "arguments": {"a": 3, "b": 4}}) == THREE_AND_FOUR


@pytest.mark.parametrize(
    "body",
    [
        "f(x=b'1')", "f(x={1, 2})", "f(x=1j)", "f(x=...)", "f(x={(1, 2): 3})", "f(x=1e999)", f"f(x=0x{'f' * 5000})",
        '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {"x": 1e999}}',
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_saved_or_rendered_is_no_argument(body: str) -> None:
    with pytest.raises(NotACallError, match=r"an argument cannot be used: .*; write text, numbers, lists and objects"):
        parse(f"<tool_call>{body}</tool_call>", [])


def test_arguments_become_what_json_knows() -> None:
    _, (call,) = parse("<tool_call>f(x=(1, {2: None}), y='\\ud800')</tool_call>", [])
    assert call["function"]["arguments"] == {"x": [1, {"2": None}], "y": "?"}
    assert json.loads(json.dumps(call, ensure_ascii=False).encode()) == call


def test_a_call_whose_arguments_are_json_text_is_shown_too() -> None:
    assert call_text({"function": {"name": "f", "arguments": '{"x": 1}'}}) == '<tool_call>f({"x": 1})</tool_call>'

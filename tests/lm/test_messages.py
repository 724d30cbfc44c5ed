"""What chat messages say, as text."""

from __future__ import annotations

from typing import Any

import pytest

from grouprl.lm.messages import conversation_text, message_text, text_of

PARTS = [{"type": "text", "text": "2 + 2"}, {"type": "image", "url": "four.png"}, {"type": "text", "text": " ="}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("2 + 2 =", "2 + 2 ="),
        (None, ""),
        ([], ""),
        (PARTS, "2 + 2 ="),
        (tuple(PARTS), "2 + 2 ="),
        ([{"type": "text", "text": None}, {"type": "text", "text": "4"}], "4"),
        (["2 + 2", " ="], "2 + 2 ="),
        (4, "4"),
    ],
)
def test_the_text_of_a_content(content: Any, text: str) -> None:
    assert text_of(content) == text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": PARTS}, "2 + 2 ="),
        ({"role": "assistant"}, ""),
        ({"content": "Well. ", "tool_calls": [CALL, CALL]}, "Well. " + 2 * "<tool_call>add(a=2, b=2)</tool_call>"),
        ({"content": None, "tool_calls": [CALL]}, "<tool_call>add(a=2, b=2)</tool_call>"),
        ({"content": "4", "tool_calls": None}, "4"),
        ({"content": "4", "reasoning_content": "2 and 2"}, "<think>\n2 and 2\n</think>\n\n4"),
        ({"content": "", "tool_calls": [{"name": "add"}]}, "{'name': 'add'}"),
    ],
)
def test_a_message_for_people_to_read(message: dict[str, Any], text: str) -> None:
    assert message_text(message) == text


def test_a_conversation_for_people_to_read() -> None:
    asked, called = {"role": "user", "content": PARTS}, {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "name": "add", "content": "4"}
    assert conversation_text([asked, called, result]) == (
        "user: 2 + 2 =\nassistant: <tool_call>add(a=2, b=2)</tool_call>\ntool: 4"
    )

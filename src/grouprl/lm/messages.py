"""What chat messages say, as text.

A message is a mapping with ``role`` and ``content``, and ``tool_calls`` where the model calls functions. The content is
a text, or a list of parts such as ``[{"type": "text", "text": "..."}]``, or None where a message only calls functions.
What the model thought before may stand in ``reasoning_content``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_of(content: Any) -> str:
    """The text of a message's content: its parts one after another; "" for None, and for a part without text."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list | tuple):
        return "".join(_of_part(part) for part in content)
    return str(content)


def said_text(message: Mapping[str, Any]) -> str:
    """What a message says, behind the thoughts that stand apart from it, as models write them."""
    thoughts = message.get("reasoning_content")
    return (f"<think>\n{thoughts}\n</think>\n\n" if thoughts else "") + text_of(message.get("content"))


def call_text(call: Mapping[str, Any]) -> str:
    """A call of a function as the model writes it."""
    function = call["function"]
    given = function.get("arguments") or {}
    said = ", ".join(f"{name}={value!r}" for name, value in given.items()) if isinstance(given, Mapping) else str(given)
    return f"<tool_call>{function['name']}({said})</tool_call>"


def message_text(message: Mapping[str, Any]) -> str:
    """What a message says, its thoughts and calls of functions included, for people to read."""
    return said_text(message) + "".join(map(_shown_call, message.get("tool_calls") or ()))


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages for people to read, each on lines of its own behind its role."""
    return "\n".join(f"{message['role']}: {message_text(message)}" for message in messages)


def _of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    return "" if text is None else str(text)


def _shown_call(call: Any) -> str:
    try:
        return call_text(call)
    except (AttributeError, KeyError, TypeError):  # of a dataset, in a form that its chat template may know
        return str(call)

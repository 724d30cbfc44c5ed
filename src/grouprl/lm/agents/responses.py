"""What a model wrote, as the message that the tokenizer's response template makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grouprl.errors import shown
from grouprl.lm.agents import tool_calls
from grouprl.lm.agents.tool_calls import NotACallError, Schema


def has_response_template(tokenizer: Any) -> bool:
    """Whether the tokenizer says how responses are read."""
    return getattr(tokenizer, "response_template", None) is not None


def read_response(
    tokenizer: Any, text: str, end: str, opening: str, schemas: Sequence[Schema] = (), *, skip_special_tokens: bool
) -> dict[str, Any]:
    """The assistant's message, with the fields that the response template has, and content in any case.

    Args:
        text: what the model wrote, with its special tokens. end: the token that ended it, as text; "" if none did.
        opening: what the model read before. schemas: the tools, which tell the types of arguments.
        skip_special_tokens: leave special tokens out of the content.

    Raises:
        NotACallError: the template makes nothing of the text, or a call that is none.
        Exception: of the template, which raises what it likes.
    """
    tools = {"tools": list(schemas)} if schemas else {}  # which older versions of transformers do not take
    parsed = tokenizer.parse_response(text + end, prefix=opening, **tools)
    if not isinstance(parsed, Mapping):
        raise NotACallError(f"the response template makes nothing of {shown(text)}")
    message = {"role": "assistant", **{key: value for key, value in parsed.items() if value is not None}}
    calls = message.pop("tool_calls", None)
    content = str(message.get("content") or "").removesuffix(end)
    message["content"] = without_special(tokenizer, content) if skip_special_tokens else content
    return {**message, "tool_calls": [tool_calls.of_json(call) for call in calls]} if calls else message


def without_special(tokenizer: Any, text: str) -> str:
    """A text without the tokenizer's special tokens."""
    for token in getattr(tokenizer, "all_special_tokens", ()):
        text = text.replace(token, "")
    return text

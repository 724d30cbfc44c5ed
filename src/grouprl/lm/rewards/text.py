"""What reward functions have in common: their type, the text of a completion, the columns of a data set.

A reward function is called once per batch, f(prompts, completions, completion_ids=..., **columns), and returns one
entry per sample: a number, or None where it does not apply. Completions are strings, or lists of messages where the
prompts are; the columns of the data set arrive as lists of the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.messages import text_of

Completion = str | Sequence[Mapping[str, Any]]
RewardFunction = Callable[..., list[float | None]]


def completion_text(completion: Completion) -> str:
    """The text of a completion: itself, or the contents of its assistant messages, one after another.

    A content is a string, None (a message that only calls a tool), or a list of parts of which those of type "text"
    count. Raises UsageError for anything else.
    """
    if isinstance(completion, str):
        return completion
    messages = [m for m in completion if isinstance(m, Mapping)] if isinstance(completion, Sequence) else None
    if messages is None or len(messages) != len(completion):
        raise UsageError(f"a completion is a string or a list of messages, got {completion!r:.200}.")
    return "".join(_content(message) for message in messages if message.get("role", "assistant") == "assistant")


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        return text_of([part for part in content if part.get("type") == "text"])
    raise UsageError(f"the content of a message is a string or a list of parts, got {content!r:.200}.")


def column(name: str, columns: Mapping[str, Any], n: int, who: str) -> Sequence[Any]:
    """The column `name`, which must hold `n` entries. Raises UsageError, in the name of `who`, if it does not."""
    values = columns.get(name)
    if values is None:
        have = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, (list, tuple))))
        raise UsageError(f"the reward {who} needs the column {name!r}; it was given: {have or 'none'}.")
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != n:
        given = f"{len(values)} entries" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
        raise UsageError(f"the column {name!r} of the reward {who} must be a list of {n} entries, got {given}.")
    return values


def named(function: RewardFunction, name: str) -> RewardFunction:
    """`function` called `name`, which is what its metrics are called."""
    function.__name__ = function.__qualname__ = name
    return function

"""Tools: functions of the user's that a model may call, with what it is told of them and what becomes of each call.

A call may do anything: raise, never return, return megabytes or something that is no text. The model gets a text of
bounded length in every case, and the training goes on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grouprl.errors import UsageError, error_text, first_line, shown
from grouprl.lm.agents.tool_calls import Schema
from grouprl.lm.messages import text_of
from grouprl.lm.rewards.event_loop import EventLoop
from grouprl.redaction import redact
from grouprl.runs.time_limit import Expired, within

Function = Callable[..., Any]
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Outcome:
    """What a call came to: the text that the model reads, whether it failed, and whether its time was over."""

    text: str
    failed: bool = False
    late: bool = False


def schema_of(function: Any, what: str = "tool") -> Schema:
    """A function as JSON schema, by its name, type hints and docstring.

    Raises:
        UsageError: it is no function, or lacks one of these.
    """
    name = getattr(function, "__name__", None)
    if not callable(function) or isinstance(function, type) or not isinstance(name, str):
        raise UsageError(
            f"{what} {shown(function)} is no function with a name; give a function with type hints and a docstring"
        )
    if not _NAME.fullmatch(name):
        raise UsageError(f"{what} {name!r} has no name that a model could call; give a function made with def")
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema = get_json_schema(function)
    except Exception as error:  # two kinds of its own, and what the type hints of the user raise when they are read
        raise UsageError(
            f"{what} {name!r} cannot be described to the model: {first_line(error)}; give it type hints for all "
            "parameters and a docstring with a line for each under 'Args:'"
        ) from error
    return schema


class Tools:
    """Functions by name, sync or async.

    Args:
        functions: the functions; schemas: theirs, if they are known already.
        timeout: seconds that a call may take; None: any time. most: characters of a result that the model reads.
        loop: where async functions run, all in one so that clients which belong to a loop keep theirs.

    Raises:
        UsageError: two have one name, or one cannot be described to the model.
    """

    def __init__(
        self, functions: Sequence[Function], timeout: float | None, most: int, loop: EventLoop,
        schemas: Sequence[Schema] | None = None,
    ) -> None:  # fmt: skip
        self.schemas = [schema_of(function) for function in functions] if schemas is None else schemas
        self._functions: dict[str, Function] = {}
        self._timeout, self._most, self._loop = timeout, most, loop
        for function in functions:
            if function.__name__ in self._functions:
                raise UsageError(f"two tools are called {function.__name__!r}; rename one of them")
            self._functions[function.__name__] = function

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    def call(self, name: str, arguments: Any) -> Outcome:
        """Call a function by its name. It never raises, except for Ctrl-C."""
        function = self._functions.get(name)
        if function is None:
            return self._failed(f"Tool {name} not found. There are: {', '.join(self._functions)}.")
        if not isinstance(arguments, Mapping):
            return self._failed(f"Arguments of {name} must have names.")
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            return self._failed(f"{name}: {error}.")
        except ValueError:  # a built-in without a signature
            pass
        try:
            return self._run(function, arguments)
        except KeyboardInterrupt:
            raise
        except Expired:
            return Outcome(self._failed(f"{name} did not return.").text, True, True)
        except BaseException as error:  # sys.exit in a tool ends no training
            return self._failed(error_text(error, whole=True))

    def _run(self, function: Function, arguments: Mapping[str, Any]) -> Outcome:
        name = function.__name__

        def call() -> Any:
            result = function(**arguments)
            return result if inspect.isawaitable(result) else plain_text(result, f"the tool {name}")

        try:
            text = within(self._timeout, call)
            if not isinstance(text, str):
                text = plain_text(self._loop.run(text, self._timeout), f"the tool {name}")
        except TimeoutError as error:
            if error.args or self._timeout is None:  # the tool's own
                raise
            return Outcome(self._failed(f"{name} had not returned after {self._timeout:g} seconds.").text, True, True)
        return Outcome(bounded(text, self._most))

    def _failed(self, why: str) -> Outcome:
        # An error quotes what it failed with, such as an address with its key: no word for a model or a transcript.
        return Outcome(bounded(redact(str({"error": why})), self._most), failed=True)


class NotTextError(ValueError):
    """Something that a model cannot read."""


def plain_text(result: Any, whose: str) -> str:
    """What a tool returned as text: text as it is, also in parts; numbers, lists and the like as Python writes them.

    Raises:
        NotTextError: it is or holds bytes, an object that has no text of its own, or an image or the like.
    """
    if isinstance(result, str):
        return result
    if is_text_blocks(result):
        return text_of(result)
    for part in _parts(result):
        if (kind := _not_text(part)) is not None:
            holds = "" if part is result else f"{type(result).__name__} with "
            raise NotTextError(f"{whose} returned {holds}{kind}, which is not text")
    return str(result)


_ADDRESS = re.compile(r"<.* at 0x[0-9a-fA-F]+.*>", re.DOTALL)
"""What Python writes of an object that has no text of its own, such as a generator: where it is in memory."""

_MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url")
_OF_MEDIA = {*_MEDIA, "type", "url", "path", "data", "base64", "source", "format", "detail", "mime_type", "mimeType"}


def _parts(value: Any) -> Iterator[Any]:
    """A value, and whatever it holds if it is a container of Python's, each once."""
    seen: set[int] = set()
    left = [value]
    while left:
        part = left.pop()
        yield part
        if isinstance(part, list | tuple | set | frozenset | dict) and id(part) not in seen:
            seen.add(id(part))
            left += [*part, *part.values()] if isinstance(part, dict) else [*part][::-1]


def _not_text(part: Any) -> str | None:
    """What a value is, if it has no text: bytes, a nameless object, or a part of a message that is no text."""
    if isinstance(part, str | int | float | None):
        return None
    if isinstance(part, dict):
        media = part.get("type") in _MEDIA and part.keys() <= _OF_MEDIA
        return f"a part of the type {part['type']!r}" if media else None
    if isinstance(part, list | tuple | set | frozenset):
        return None
    nameless = isinstance(part, bytes | bytearray | memoryview) or _ADDRESS.fullmatch(str(part))
    return type(part).__name__ if nameless else None


def is_text_blocks(given: Any) -> bool:
    """Whether it is text in the parts that chat templates know: ``[{"type": "text", "text": "..."}]``."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in given
        )
    )


def bounded(text: str, most: int) -> str:
    """At most ``most`` characters of a text, and valid UTF-8; where something was cut off, its end says so."""
    if len(text) > most:
        note = f"... [cut: {len(text)} characters]"
        text = text[: most - len(note)] + note
    return text.encode("utf-8", "replace").decode("utf-8")

"""Tool calls as text, for models whose chat template knows none: what the model is told, and how its calls are read.

A call stands between ``<tool_call>`` and ``</tool_call>``, as a call in Python or as JSON::

    <tool_call>add(a=3, b=4)</tool_call>
    <tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>

The model is shown the first way (``messages.call_text``), which is shorter and needs fewer marks to be right. Results
come back between ``<tool_response>`` and ``</tool_response>``.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grouprl.errors import shown

Schema = Mapping[str, Any]
"""A function as JSON schema, as ``transformers.utils.get_json_schema`` makes it."""

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_PART = re.compile(r"<(think|tool_call)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_LONGEST_CALL = 100_000


class NotACallError(ValueError):
    """What stands between the marks cannot be read as a call; the message says why, for the model to read."""


def described(schemas: Sequence[Schema]) -> str:
    """What the model is told of the tools: names, parameters, descriptions, and one call as an example."""
    lines = ["You can use these tools:" if len(schemas) > 1 else "You can use this tool:"]
    for schema in schemas:
        function = schema["function"]
        parameters = ", ".join(f"{name}: {_type(kind)}" for name, kind in _parameters(schema).items())
        lines.append(f"{function['name']}({parameters}) - {' '.join(str(function.get('description', '')).split())}")
        lines += [
            f"  {name}: {' '.join(str(kind['description']).split())}"
            for name, kind in _parameters(schema).items()
            if isinstance(kind, Mapping) and kind.get("description")
        ]
    lines.append(
        f"To use {'one' if len(schemas) > 1 else 'it'}, write <tool_call>{_example(schemas[0])}</tool_call> and stop. "
        "The result comes back to you. Then give the answer."
    )
    return "\n".join(lines)


def response(content: str) -> str:
    """The result of a call as the model reads it."""
    return f"<tool_response>{content}</tool_response>"


def parse(text: str, schemas: Sequence[Schema]) -> tuple[str, list[dict[str, Any]]]:
    """What the model wrote, taken apart: the text outside of calls, and its calls in their order.

    Args:
        schemas: the functions there are, whose parameters name arguments that are given by position.

    Raises:
        NotACallError: something between the marks is no call.
    """
    calls = [call for found in _CALL.finditer(text) for call in _read(found[1].strip(), schemas)]
    return _CALL.sub("", text).strip(), calls


def without_thoughts(text: str) -> tuple[str, str]:
    """What the model wrote outside of ``<think>`` and ``</think>``, and what it wrote between them.

    A thought that is not closed goes to the end of the text. The marks of a thought within a call are part of the call.
    """
    thoughts = [found[2].strip() for found in _PART.finditer(text) if found[1] == "think"]
    rest = _PART.sub(lambda found: "" if found[1] == "think" else found[0], text)
    return (rest.strip() if thoughts else text), "\n".join(filter(None, thoughts))


def as_call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call as chat templates know it: its arguments are what JSON can hold, so that it can be rendered and saved.

    Raises:
        NotACallError: JSON cannot hold one of the arguments.
    """
    try:
        return {"type": "function", "function": {"name": _utf8(name), "arguments": _plain(arguments)}}
    except RecursionError:
        raise NotACallError(f"the arguments of {shown(name)} are nested too deeply; write simpler ones") from None


_LARGEST_NUMBER = 1024
"""Bits of the largest whole number: no float is larger."""


def _plain(value: Any) -> Any:
    """A value as JSON knows it, tuples as lists and names as text."""
    if isinstance(value, str):
        return _utf8(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= _LARGEST_NUMBER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping) and all(isinstance(key, str | int | float | None) for key in value):
        return {_utf8(str(key)): _plain(part) for key, part in value.items()}
    what = f"it is a {type(value).__name__}"
    if isinstance(value, int | float):
        what = f"{value} is no finite number" if isinstance(value, float) else "that number is too large"
    raise NotACallError(f"an argument cannot be used: {what}; write text, numbers, lists and objects as in JSON")


def _utf8(text: str) -> str:
    """Text that can be written down: halves of characters, as JSON may spell them, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(body: str, schemas: Sequence[Schema]) -> list[dict[str, Any]]:
    if len(body) > _LONGEST_CALL:
        raise NotACallError(f"the call has {len(body)} characters; write a shorter one")
    if body[:1] in ("{", "["):
        try:
            given = _of_json_text(body)
        except NotACallError:
            raise
        except (ValueError, RecursionError) as error:
            raise NotACallError(f"the call {shown(body)} is not JSON: {error}") from None
        if given == []:
            raise NotACallError(f"the list [] holds no call; write one as {_example(schemas[0])}")
        return [of_json(entry) for entry in (given if isinstance(given, list) else [given])]
    try:
        tree = ast.parse(body, mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise ValueError
        name = tree.func.id
        positional = [ast.literal_eval(value) for value in tree.args]
        named = [(keyword.arg, ast.literal_eval(keyword.value)) for keyword in tree.keywords]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise NotACallError(f"the call {shown(body)} cannot be read; write it as {_example(schemas[0])}") from None
    if any(key is None for key, _ in named):
        raise NotACallError(f"the call {shown(body)} has **; write each argument as {name}(name=value)")
    return [as_call(name, _each_once([*_by_name(name, positional, schemas).items(), *named], f"the call of {name}"))]


def _of_json_text(text: str) -> Any:
    """What JSON holds. Raises NotACallError if an object has a key twice, ValueError if it is no JSON."""
    return json.loads(text, object_pairs_hook=lambda pairs: _each_once(pairs, "an object of the call"))


def _each_once(pairs: Sequence[tuple[Any, Any]], what: str) -> dict[str, Any]:
    """Keys with their values. Raises NotACallError if one comes twice: nobody knows which value was meant."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise NotACallError(f"{what} gives {shown(key)} twice; give it once")
        found[key] = value
    return found


def of_json(entry: Any) -> dict[str, Any]:
    function = entry.get("function", entry) if isinstance(entry, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments", function.get("parameters", {})) if isinstance(function, Mapping) else None
    if isinstance(arguments, str):  # JSON within JSON
        try:
            arguments = _of_json_text(arguments)
        except NotACallError:
            raise
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise NotACallError(f"the call {shown(entry)} has no name with arguments")
    return as_call(name, arguments)


def _by_name(name: str, positional: Sequence[Any], schemas: Sequence[Schema]) -> dict[str, Any]:
    if not positional:
        return {}
    for schema in schemas:
        if schema["function"]["name"] == name:
            names = list(_parameters(schema))
            if len(positional) > len(names):
                raise NotACallError(f"{name} takes {len(names)} arguments and is given {len(positional)}")
            return dict(zip(names, positional, strict=False))
    return {f"argument {i}": value for i, value in enumerate(positional)}  # of a tool that there is not


def _parameters(schema: Schema) -> Mapping[str, Any]:
    return schema["function"].get("parameters", {}).get("properties", {})  # type: ignore[no-any-return]


_EXAMPLES: Mapping[str, Any] = {"integer": 3, "number": 2.5, "boolean": True, "array": [1, 2], "object": {"key": 1}}


def _type(kind: Any) -> str:
    said = kind.get("type", "any") if isinstance(kind, Mapping) else "any"
    return " or ".join(map(str, said)) if isinstance(said, list) else str(said)


def _example(schema: Schema) -> str:
    """A call of the tool, with values of the right types."""
    said = []
    for name, kind in _parameters(schema).items():
        choices = kind.get("enum") if isinstance(kind, Mapping) else None
        value = choices[0] if choices else _EXAMPLES.get(_type(kind).split(" or ")[0], "...")
        said.append(f"{name}={json.dumps(value) if isinstance(value, str) else repr(value)}")
    return f"{schema['function']['name']}({', '.join(said)})"

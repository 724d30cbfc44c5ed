"""Reading what people wrote: what is crafted or broken ends in a line, soon and in little memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError, first_line, shown

LONGEST = 200_000
"""Characters of what a person writes."""
_DEEPEST = 100
_MOST = 100_000


def read_yaml(path: str | os.PathLike[str], longest: int = LONGEST) -> Any:
    """What a YAML file of at most ``longest`` bytes says, as plain values.

    Raises UsageError, with the file's name, if it cannot be read.
    """
    try:
        size = os.stat(path).st_size
        if not Path(path).is_file():
            raise UsageError(f"cannot read {path}: it is no file")
        if size > longest:
            raise UsageError(f"cannot read {path}: it has {size} bytes, and {longest} are the most")
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot read {path}: it is not text in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    return parse_yaml(text, str(path), longest)


def parse_yaml(text: str, where: str, longest: int = LONGEST) -> Any:
    """What YAML says, as plain values.

    Raises UsageError, beginning with ``where``, if it is none, or if it would be too large: aliases (``*a``) can make
    megabytes of a few lines, or a value that holds itself.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is much faster
    if len(text) > longest:
        raise UsageError(f"{where} has {len(text)} characters, and {longest} are the most")
    try:
        twice = _key_given_twice(yaml.compose(text, loader))
        value = None if twice else yaml.load(text, loader)
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise UsageError(f"{where} is not YAML: {error.problem or error.context}{place}") from None
    except Exception as error:  # the values of tags and dates are read by Python's own functions
        raise UsageError(f"{where} is not YAML: {first_line(error)}") from None
    if twice is not None:
        line = twice.start_mark.line + 1
        raise UsageError(
            f"{where} has the key {shown(twice.value)} twice in one mapping, again in line {line}: "
            "leave one out, or give it another name"
        )
    check_size(value, where)
    return value


def _key_given_twice(root: Any) -> Any:
    """The node of the first key that its mapping has already; None if there is none."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))
        keys = set()
        for part in node.value:
            if not isinstance(part, tuple):  # a node of a list
                waiting.append(part)
                continue
            waiting += part
            key = (part[0].tag, part[0].value)
            if isinstance(part[0].value, str) and part[0].tag != "tag:yaml.org,2002:merge":
                if key in keys:
                    return part[0]
                keys.add(key)
    return None


def with_numbers(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` (no dot) as text; people mean the number, also inside a mapping or a list.

    A number in quotes, such as ``"12"``, stays text.
    """
    if isinstance(value, dict):
        return {key: with_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [with_numbers(part) for part in value]
    return float(value) if isinstance(value, str) and _WITH_EXPONENT.fullmatch(value) else value


_WITH_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def check_size(value: Any, where: str) -> None:
    """Raises UsageError if plain values hold themselves, or are nested deeply or many, each counted where it stands."""
    _measure(value, where, {})


def _measure(value: Any, where: str, measured: dict[int, tuple[int, int] | None], depth: int = 0) -> tuple[int, int]:
    """How many values it holds, itself included, and how deep they are nested."""
    if not isinstance(value, dict | list | tuple | set):
        return 1, 0
    if id(value) not in measured:
        if depth > _DEEPEST:
            raise UsageError(f"{where} is nested more than {_DEEPEST} deep")
        measured[id(value)] = None
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        sizes = [_measure(part, where, measured, depth + 1) for part in parts]
        measured[id(value)] = 1 + sum(n for n, _ in sizes), 1 + max((height for _, height in sizes), default=0)
    size = measured[id(value)]
    if size is None:
        raise UsageError(f"{where} holds a value that holds itself")
    if size[0] > _MOST:
        raise UsageError(f"{where} holds more than {_MOST} values, counted where they stand")
    if depth + size[1] > _DEEPEST + 1:
        raise UsageError(f"{where} is nested more than {_DEEPEST} deep")
    return size

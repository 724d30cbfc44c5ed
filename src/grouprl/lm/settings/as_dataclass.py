"""A configuration that parsers of dataclasses take: transformers' HfArgumentParser, and TRL's parser made of it.

They ask a class for ``dataclasses.fields`` and for type hints of the few kinds that argparse can read, and then call it
with a value for each field. So the configuration has both beside what pydantic has of it: its settings, and the options
of TRL's that are none here, so that a command line written for TRL parses and each is heard or refused by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grouprl.lm.settings.trl import FOREIGN, RENAMED, same

_Metaclass: Any = type(BaseModel)


class DataclassLike(_Metaclass):  # type: ignore[misc]
    """The metaclass of a configuration that reads as a dataclass."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        """Makes the class, and shows it to parsers."""
        with _own_annotations(bases):
            made = super().__new__(cls, name, bases, namespace, **options)
        shape = dataclasses.make_dataclass(name, _fields(made.model_fields), repr=False, eq=False)
        made.__dataclass_fields__ = vars(shape)["__dataclass_fields__"]
        made.__dataclass_params__ = vars(shape)["__dataclass_params__"]
        made._annotations = vars(made).get("__annotations__", {})
        made.__annotations__ = {**made._annotations, **{f.name: f.type for f in dataclasses.fields(shape)}}
        return made


@contextmanager
def _own_annotations(bases: Sequence[type]) -> Iterator[None]:
    """While a class is made, those above it have their own annotations alone: pydantic takes each for a setting."""
    shown = [(kind, kind.__annotations__) for base in bases for kind in base.__mro__ if "_annotations" in vars(kind)]
    for kind, _ in shown:
        kind.__annotations__ = vars(kind)["_annotations"]
    try:
        yield
    finally:
        for kind, annotations in shown:
            kind.__annotations__ = annotations


def _fields(settings: Mapping[str, FieldInfo]) -> list[tuple[str, Any, Any]]:
    """Name, type and default of each setting and of each option of TRL's, as dataclasses write them."""
    found = []
    for name, setting in settings.items():
        kind, more = _readable(setting.annotation)
        more["help"] = (setting.description or "").replace("%", "%%")
        old = [before for before, now in RENAMED.items() if now == name]
        if old:
            more |= {"aliases": [f"--{spelt}" for before in old for spelt in _spellings(before)], "action": _Once}
        found.append((name, kind, _field(setting.get_default(call_default_factory=True), more)))
    for name, option in FOREIGN.items():
        kind, more = _readable(str | None if option.off is None else type(option.off))
        more["help"] = option.advice.replace("%", "%%") or "changes nothing here"
        found.append((name, kind, _field(option.off, more)))
    return found


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list | tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _readable(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """The type as which argparse reads a setting of this annotation, and arguments of ``add_argument``.

    What it reads is checked when the configuration is made, as everything that it is given.
    """
    parts = [part for part in _parts(annotation) if part is not type(None)]
    optional = len(parts) < len(_parts(annotation))
    kind: Any = parts[0] if len(parts) == 1 else str
    more: dict[str, Any] = {}
    if get_origin(kind) in (tuple, list) or kind in (tuple, list):
        of = (*get_args(kind), str)[0]
        kind = list[of if of in (int, float) else str]  # type: ignore[misc]
    elif get_origin(kind) is Literal:
        more["metavar"] = "{" + ",".join(map(str, get_args(kind))) + "}"
        kind = str
    elif kind not in (bool, int, float, str):
        more["metavar"] = "JSON"
        kind = str
    if bool in parts and (optional or kind is not bool):
        more |= {"nargs": "?", "const": True}
    return (kind | None if optional else kind), more


def _parts(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((name, name.replace("_", "-"))))


class _Once(argparse.Action):
    """Stores what a setting is given under one of its names; another value under another name is an error.

    An old name's 0 says nothing: scripts pass both on.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        of, before = getattr(self, "given", (None, None))
        before = before if of is namespace else None  # of this command line, and not of one read before
        now = (str(option_string).lstrip("-").replace("-", "_"), values)
        if before is not None and before[0] != now[0] and not same(before[1], values):
            silent = [one for one in (before, now) if one[0] != self.dest and same(one[1], 0)]
            if not silent:
                parser.error(f"--{before[0]} {before[1]} and --{now[0]} {now[1]} are one setting; give {self.dest}")
            now = before if silent[0] is now else now
        self.given = (namespace, now)
        setattr(namespace, self.dest, now[1])

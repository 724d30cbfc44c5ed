"""A configuration in words: what is wrong with a value, which are allowed, which settings a section has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from grouprl.errors import shown
from grouprl.settings.names import OneOf


def explain(error: ValidationError, settings: Mapping[str, FieldInfo]) -> str:
    """A configuration's validation errors for people: what was given, what is allowed, what the setting is."""
    lines: list[str] = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        if problem["loc"]:
            name = str(problem["loc"][0])
            info = settings[name]
            message = (
                f"{name}={shown(problem['input'])}: {message} ({info.description}; default {info.get_default()!r})"
            )
        if message not in lines:
            lines.append(message)
    return "; ".join(lines)


def sections(config: type[BaseModel]) -> dict[str, list[str]]:
    """The settings of a configuration under the titles of its sections: its source's ``# --- title ---`` comments."""
    found: dict[str, list[str]] = {}
    for kind in reversed(config.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        title = ""
        for line in inspect.getsource(kind).splitlines():
            if heading := re.match(r"    # --- (.*?)(:.*)? -+$", line):
                title = heading[1]
            elif (setting := re.match(r"    ([a-z]\w*): ", line)) and setting[1] in config.model_fields:
                found.setdefault(title, []).append(setting[1])
    return found


def allowed(field: FieldInfo, mark: str = "") -> str:
    """The values that a setting takes, in words; ``mark`` stands before and behind each that is to be typed."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) not in (Literal, tuple, dict) else ()
    kinds = kinds or (field.annotation,)
    for limit in field.metadata:
        if isinstance(limit, OneOf):
            return ", ".join(f"{mark}{name}{mark}" for name in limit.names)
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += [f"{mark}{value}{mark}" for value in get_args(kind)]
        elif get_origin(kind) is tuple:
            words.append(f"a list of {_members(get_args(kind)[0], mark)}")
        elif get_origin(kind) is dict:
            words.append("a mapping")
        elif kind is bool:
            words += [f"{mark}true{mark}", f"{mark}false{mark}"]
        elif kind is NoneType:
            words.append("none")
        else:
            bounds = [
                f"{sign} {getattr(limit, name):g}"
                for limit in field.metadata
                for name, sign in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
                if hasattr(limit, name)
            ]
            word = {int: "integer", float: "number", str: "text"}[kind]
            words.append(" ".join([word, " and ".join(bounds)]).strip())
    return ", ".join(words)


def _members(kind: Any, mark: str) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"{mark}{value}{mark}" for value in get_args(kind))
    return {int: "integers", float: "numbers", str: "texts"}[kind]

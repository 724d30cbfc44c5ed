"""A configuration in words: what is wrong with a value, and which settings stand under which title."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from grouprl.errors import shown


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

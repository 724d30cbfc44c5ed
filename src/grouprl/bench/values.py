"""Values in the file of a benchmark or a sweep, one by one; each raises UsageError for what it must not be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError, shown
from grouprl.reading import with_numbers


def named(values: Mapping[str, Any], key: str, path: Path) -> list[tuple[Any, Any]]:
    """Names with their options: a mapping, or a list of names that need none."""
    given = values.get(key) or {}
    if isinstance(given, list):
        twice = [name for name in given if given.count(name) > 1]
        if twice:
            raise UsageError(f"{key} in {path}: {shown(twice[0])} is named twice")
        given = {name: {} for name in given} if all(isinstance(name, str) for name in given) else None
    if not isinstance(given, dict):
        raise UsageError(f"{key} in {path} must be a mapping of names to options, or a list of names")
    for name in given:
        if not isinstance(name, str) and str(name) in given:
            raise UsageError(f"{key} in {path}: {str(name)!r} is named twice, once in quotes and once without")
        if "/" in str(name) and key == "methods":
            raise UsageError(f"method {shown(name)} in {path}: a method's name cannot hold a slash")
    return list(given.items())


def mapping(given: object, where: str, known: Collection[str] | None) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise UsageError(f"{where} must be a mapping, not {shown(given)}")
    for key in given if known is not None else ():
        if key not in (known or ()):
            close = difflib.get_close_matches(key, known or (), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known or ())}"
            raise UsageError(f"{where}: unknown key {key!r}; {hint}")
    return given


def names(given: object, where: str) -> list[str]:
    if isinstance(given, list) and all(isinstance(one, str) for one in given):
        return given
    raise UsageError(f"{where} must be a list of names, not {shown(given)}")


def whole(given: object, where: str) -> int:
    if isinstance(given, str):  # YAML reads 1e6 as text
        try:
            given = float(given)
        except ValueError:
            given = None
    number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
    if not number or given < 1 or given != int(given):  # type: ignore[operator, call-overload]
        raise UsageError(f"{where} must be a whole number, at least 1, such as 100000 or 1e6")
    return int(given)  # type: ignore[call-overload, no-any-return]


def positive(given: object, where: str, *, zero: bool = False) -> float:
    number = with_numbers({"it": given})["it"]  # YAML reads 1e-3 as text
    if isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf and (number or zero):
        return float(number)
    raise UsageError(f"{where}={shown(given)} must be a number{' of 0 or more' if zero else ' above 0'}, such as 0.5")

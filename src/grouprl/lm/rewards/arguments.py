"""What a reward function is called with: columns of the dataset and the rest, by the names in its signature."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from grouprl.errors import UsageError, shown
from grouprl.lm.prompts import Prompt

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def columns_of(rows: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The columns of the dataset, an entry for each row. Raises UsageError if one has a name that is taken."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    check_names(names)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def check_names(names: Iterable[Any], dataset: str = "the dataset") -> None:
    """Raises UsageError if a column of ``dataset`` has a name that is taken."""
    for name in names:
        if name in RESERVED:
            raise UsageError(
                f"{dataset} has a column {name!r}, under which reward functions are given something else; rename it: "
                f"dataset.rename_column({name!r}, ...)"
            )


def arguments_for(
    function: Any, name: str, offered: Mapping[str, Any], dataset: str = "the dataset"
) -> dict[str, Any]:  # fmt: skip
    """What ``function`` is called with: everything if it takes ``**kwargs``, else what its signature names.

    Args:
        name: the function's, for messages. offered: columns of the dataset, and the rest. dataset: what it is called.

    Raises UsageError if it asks for what is not offered, or cannot be given what is.
    """
    _check_partial(function, name, offered, dataset)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return _owned(offered)
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UsageError(
                f"reward function {name!r} takes {parameter.name!r} by position only, but is called by name; remove "
                "the slash from its signature"
            )
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name not in offered:
            columns = ", ".join(str(key) for key in offered if key not in RESERVED) or "none"
            raise UsageError(
                f"reward function {name!r} asks for {parameter.name!r}, which is neither a column of {dataset} "
                f"({columns}) nor one of {', '.join(RESERVED)}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        bound = _bound(function)
        for key in offered:
            if not isinstance(key, str) or key in bound:
                why = "has that name for itself" if isinstance(key, str) else "is given columns by name, which is text"
                raise UsageError(
                    f"{dataset} has a column {key!r}, and reward function {name!r} {why}; rename the column: "
                    f"dataset.rename_column({key!r}, ...)"
                )
        return _owned(offered)
    wanted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return _owned({key: value for key, value in offered.items() if key in wanted})


def _check_partial(function: Any, name: str, offered: Mapping[str, Any], dataset: str) -> None:
    """Raises UsageError where a column would take the place of what functools.partial was given."""
    while isinstance(function, functools.partial):
        for key, value in function.keywords.items():
            if key in offered:
                raise UsageError(
                    f"{dataset} has a column {key!r}, which would take the place of {key}={shown(value)} that "
                    f"functools.partial gave to reward function {name!r}; rename the column: "
                    f"dataset.rename_column({key!r}, ...)"
                )
        function = function.func


def _bound(function: Any) -> set[str]:
    """Names of parameters that have their value by position already: self, and what functools.partial was given."""
    names: set[str] = set()
    while isinstance(function, functools.partial):
        names |= set(_positional(function.func)[: len(function.args)])
        function = function.func
    if not inspect.isroutine(function):  # an object that can be called
        function = type(function).__call__
        return names | set(_positional(function)[:1])
    return names | set(_positional(function.__func__)[:1]) if inspect.ismethod(function) else names


def _positional(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _owned(offered: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of the function's own, one for each completion, which it may change."""
    given = ("trainer_state", "log_extra", "log_metric", "environments")
    return {key: value if key in given else [copied(entry) for entry in value] for key, value in offered.items()}


def copied(value: Any) -> Any:
    """A copy of nested lists, tuples, mappings, sets and arrays; whatever else there is stays what it is."""
    kind = type(value)
    if kind in (list, tuple, set):
        return kind(map(copied, value))
    if kind is dict:
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, np.ndarray) else value

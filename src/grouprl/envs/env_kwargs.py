"""Arguments of an environment's constructor as JSON: it can be made again exactly, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from grouprl.errors import UsageError, with_type
from grouprl.redaction import with_secrets, without_secrets

_TAG = "!"
_LARGEST_ARRAY = 100_000
_GIVEN_AS = "it was given as "


def to_json(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``kwargs`` as JSON values, from which :func:`from_json` makes equal ones of the same types.

    What JSON has no type for becomes a dict with the key "!": tuples, sets, dicts whose keys are no strings, paths, and
    arrays and numbers of NumPy. A secret, such as the key of a service, has a note in its place.

    Raises:
        TypeError: an argument cannot be written so: a data frame, a function, a class, an object.
    """
    return dict(without_secrets({name: _encoded(value, name) for name, value in kwargs.items()}))


def from_json(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`to_json`, with secrets from the environment variables of the process.

    Raises:
        UsageError: an argument has a type of another version, or a secret is nowhere.
    """
    try:
        values = with_secrets(kwargs, "env_kwargs")
    except ValueError as error:
        raise UsageError(str(error)) from None
    return {name: _decode(value) for name, value in values.items()}


def _encoded(value: Any, where: str) -> Any:
    try:
        return _encode(value, where)
    except RecursionError:  # it contains itself
        raise TypeError(f"{where}={with_type(value, 40)}") from None


def _encode(value: Any, where: str) -> Any:
    kind = type(value)  # a subclass, such as an enumeration of strings, would come back as its base class
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_encode(item, where) for item in value]
    if kind is dict and _TAG not in value and all(type(key) is str for key in value):
        return {key: _encode(item, where) for key, item in value.items()}
    if kind is dict:
        return {_TAG: "dict", "items": [[_encode(key, where), _encode(item, where)] for key, item in value.items()]}
    if kind in (tuple, set, frozenset):
        items = sorted(value, key=repr) if kind is not tuple else value
        return {_TAG: kind.__name__, "items": [_encode(item, where) for item in items]}
    if isinstance(value, PurePath) and kind is type(Path()):
        return {_TAG: "path", "path": str(value)}
    numbers = (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biuf"
    if numbers and value.size <= _LARGEST_ARRAY:
        shape = list(value.shape)
        return {_TAG: kind.__name__, "dtype": str(value.dtype), "values": value.tolist(), "shape": shape}
    raise TypeError(f"{where}={with_type(value, 40)}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(item) for key, item in value.items()}
    match value[_TAG]:
        case "dict":
            return {_decode(key): _decode(item) for key, item in value["items"]}
        case "tuple" | "set" | "frozenset" as kind:
            return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](_decode(item) for item in value["items"])
        case "path":
            return Path(value["path"])
        case "ndarray":
            return np.array(value["values"], value["dtype"]).reshape(value["shape"])
        case other if "dtype" in value:
            return np.array(value["values"], value["dtype"])[()]
        case other:
            raise UsageError(
                f"a saved argument of the environment has the type {other!r}, which this grouprl does not know"
            )


def why_not_again(env: Any, kwargs: Mapping[str, Any]) -> str:
    """Why a file cannot say how to make this environment again, or "" if it can: as an id with such arguments."""
    if not isinstance(env, str):
        return f"{_GIVEN_AS}{_what(env)}, which no file can hold"
    try:
        to_json(kwargs)
    except TypeError as error:
        return f"no file can hold the argument {error} of its constructor"
    return ""


def was_an_id(reason: str) -> bool:
    """Whether the environment was an id, for which arguments can be given anew, by what :func:`why_not_again` said."""
    return not reason.startswith(_GIVEN_AS)


def _what(env: Any) -> str:
    if isinstance(env, type) or not hasattr(env, "reset"):
        return f"the callable {getattr(env, '__name__', type(env).__name__)}"
    return f"the object {with_type(env)}"

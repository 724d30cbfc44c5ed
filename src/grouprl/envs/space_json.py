"""Spaces as plain JSON, so that a saved model says what it was trained on without pickling anything."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import Space as GymnasiumSpace
from gymnasium import spaces

from grouprl.errors import UsageError

Array = npt.NDArray[Any]
Space = GymnasiumSpace[Any]


def space_to_json(space: Space) -> dict[str, Any]:
    """A supported space as plain JSON values; ``space_from_json`` gives an equal space back.

    Bounds equal everywhere are stored once. Infinite bounds are the strings "inf" and "-inf", which JSON has no number
    for. Raises UsageError for an unsupported space.
    """
    if isinstance(space, spaces.Dict):
        strange = [key for key in space.spaces if not isinstance(key, str | int)]
        if strange:
            raise UsageError(
                f"The Dict space has the key {strange[0]!r}; only strings and integers can be saved. Rename it."
            )
        return {"type": "Dict", "spaces": [[key, space_to_json(part)] for key, part in space.spaces.items()]}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [space_to_json(part) for part in space.spaces]}
    array = {"shape": list(space.shape or ()), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Box):
        return {"type": "Box", **array, "low": _compact(space.low), "high": _compact(space.high)}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "dtype": array["dtype"], "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", **array, "nvec": _compact(space.nvec), "start": _compact(space.start)}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
    raise UsageError(
        f"The space {space} cannot be saved. Allowed are Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple "
        "of these; wrap the environment so that it has one of them."
    )


def space_from_json(data: dict[str, Any]) -> Space:
    """The space that ``space_to_json`` described; UsageError if the description is of no supported space."""
    match data.get("type"):
        case "Dict":  # an OrderedDict, because Gymnasium sorts the keys of a plain one
            return spaces.Dict(OrderedDict((key, space_from_json(part)) for key, part in data["spaces"]))
        case "Tuple":
            return spaces.Tuple([space_from_json(part) for part in data["spaces"]])
        case "Box":
            shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
            low, high = _expand(data["low"], shape, dtype), _expand(data["high"], shape, dtype)
            return spaces.Box(low, high, shape, dtype.type)
        case "Discrete":
            dtype_option = {} if data["dtype"] == "int64" else {"dtype": np.dtype(data["dtype"]).type}
            return spaces.Discrete(data["n"], start=data["start"], **dtype_option)
        case "MultiDiscrete":
            shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
            nvec, start = _expand(data["nvec"], shape, dtype), _expand(data["start"], shape, dtype)
            return spaces.MultiDiscrete(nvec, dtype=dtype.type, start=start)
        case "MultiBinary":
            return spaces.MultiBinary(data["n"])
        case other:
            raise UsageError(
                f"A saved space has type {other!r}; allowed are Box, Discrete, MultiDiscrete, MultiBinary, Dict or "
                "Tuple. The file is damaged or comes from another version: save the model again."
            )


def _compact(values: Array) -> Any:
    """One value if all are equal, else the raveled list; infinities as strings."""
    numbers = [str(v) if v in (float("inf"), float("-inf")) else v for v in values.ravel().tolist()]
    return numbers[0] if numbers and len(set(numbers)) == 1 else numbers


def _expand(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if isinstance(value, list):
        return np.array([float(v) if isinstance(v, str) else v for v in value], dtype=dtype).reshape(shape)
    return np.full(shape, float(value) if isinstance(value, str) else value, dtype=dtype)

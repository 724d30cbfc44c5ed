"""Gymnasium's environments and spaces in words. The only module of the language arena that imports Gymnasium."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

from grouprl.errors import GrouprlError, TrainingError, UsageError, first_line, shown
from grouprl.extras import how_to_install
from grouprl.lm.agents.environments.known import known_words
from grouprl.lm.agents.environments.words import Words
from grouprl.lm.tasks.task import held_out

_MOST_VALUES = 64
"""Numbers of an observation that are still said one by one."""


def make(env_id: str, kwargs: Mapping[str, Any]) -> Any:
    """The environment called ``env_id``. Raises UsageError if there is none, or it cannot be made."""
    try:
        return gym.make(env_id, **{"disable_env_checker": True, **kwargs})
    except GrouprlError:
        raise
    except gym.error.DependencyNotInstalled as error:
        raise UsageError(f"{env_id} needs packages that are not installed: {first_line(error)}") from None
    except gym.error.UnregisteredEnv as error:
        close = difflib.get_close_matches(env_id.rpartition(":")[2], list(gym.registry), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "gymnasium.pprint_registry() lists them."
        raise UsageError(f"Gymnasium has no environment {shown(env_id)} ({first_line(error)}); {hint}") from None
    except ImportError as error:
        missing = f"; toy-text environments come with {how_to_install('toy-text')}" if "pygame" in str(error) else ""
        raise UsageError(f"{env_id} cannot be imported: {first_line(error)}{missing}") from error
    except Exception as error:  # whatever its constructor raises
        given = f" with {shown(dict(kwargs), 200)}" if kwargs else ""
        raise UsageError(f"{env_id} cannot be made{given}: {first_line(error)}") from error


def words_of(env: Any, name: str) -> Words:
    """The words of an environment: those of one that is known, else those of its spaces.

    Raises UsageError if it is no environment of Gymnasium. The functions in the words raise UsageError for a space that
    has no words.
    """
    if not isinstance(env, gym.Env):
        raise UsageError(f"{name} has spaces and is no gymnasium.Env; derive its class from gymnasium.Env")
    space = env.action_space
    words = known_words(env)
    if words is None:
        how = _how_to_act(space)
        words = Words(
            f"You play {name}. {how}".strip(), how, lambda seen: _said(env.observation_space, seen, name),
            lambda text: _action(space, text, name),
        )  # fmt: skip
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        masks = env.get_wrapper_attr("action_masks") if env.has_wrapper_attr("action_masks") else None
        words = replace(words, masks=masks, allowed=_allowed(space, words), is_allowed=_is_allowed(space))
    return replace(words, random=_draw(space))


def _draw(space: Any) -> Callable[[int], Any]:
    def draw(seed: int) -> Any:
        space.seed(seed)
        return space.sample()

    return draw


# --- observations -----------------------------------------------------------------------------------------------------


def _said(space: Any, value: Any, name: str) -> str:
    """An observation of ``space`` as text. Raises UsageError if it has too many numbers to say."""
    if isinstance(space, spaces.Text):
        return value  # type: ignore[no-any-return]  # checked where every observation is
    if isinstance(space, spaces.Discrete):
        return str(int(value))
    if isinstance(space, spaces.Dict):
        return "\n".join(f"{key}: {_said(part, value[key], name)}" for key, part in space.spaces.items())
    if isinstance(space, spaces.Tuple):
        return "; ".join(_said(part, value[i], name) for i, part in enumerate(space.spaces))
    if not isinstance(space, spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary):
        raise UsageError(f"{name} has observations of {space}, which have no words here; give obs_to_text")
    values = np.asarray(value)
    if values.size > _MOST_VALUES:
        raise UsageError(
            f"{name} has observations of {values.size} numbers, as {'an image has' if values.ndim > 1 else 'a text'}; "
            "give obs_to_text, a function that says in words what matters of them"
        )
    rows = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(1, -1)
    return "\n".join(" ".join(_number(number) for number in row) for row in rows)


def _number(value: Any) -> str:
    """With three digits that count, and without what says nothing: 0.0251, -1.2, 3."""
    return f"{float(value):.3g}" if isinstance(value, np.floating) else str(int(value))


# --- actions ----------------------------------------------------------------------------------------------------------


def _how_to_act(space: Any) -> str:
    if isinstance(space, spaces.Discrete):
        return f"Answer with one action, a number from {space.start} to {space.start + space.n - 1}."
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        most = _most(space)
        said = ", ".join(f"{first} to {first + n}" for first, n in zip(_first(space), most, strict=True))
        return f"Answer with {len(most)} whole numbers: {said}."
    if isinstance(space, spaces.Box):
        n = int(np.prod(space.shape))
        low, high = float(np.min(space.low)), float(np.max(space.high))
        return f"Answer with {n} number{'s' * (n != 1)} from {low:.3g} to {high:.3g}."
    if isinstance(space, spaces.Dict):
        parts = " ".join(f"{key}: {_how_to_act(part)}" for key, part in space.spaces.items())
        return f"Answer with a JSON object. {parts}"
    if isinstance(space, spaces.Tuple):
        return f"Answer with a JSON list. {' '.join(_how_to_act(part) for part in space.spaces)}"
    return ""


_INTEGER = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def _most(space: Any) -> list[int]:
    if isinstance(space, spaces.MultiBinary):
        return [1] * int(np.prod(space.shape))
    return [int(n) - 1 for n in np.ravel(space.nvec)]


def _first(space: Any) -> list[int]:
    """The smallest number of each component."""
    return [0] * len(_most(space)) if isinstance(space, spaces.MultiBinary) else [int(n) for n in np.ravel(space.start)]


def _action(space: Any, text: str, name: str) -> Any:
    """The action of ``space`` that ``text`` means, or None. Numbers beyond the bounds of a Box become the bounds."""
    if isinstance(space, spaces.Text):
        return text
    if isinstance(space, spaces.Discrete):
        number = _INTEGER.search(text)
        value = None if number is None else int(number[0])
        return value if value is not None and space.start <= value < space.start + space.n else None
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        bounds = [(first, first + n) for first, n in zip(_first(space), _most(space), strict=True)]
        numbers = [int(number) for number in _INTEGER.findall(text)[: len(bounds)]]
        fits = len(numbers) == len(bounds) and all(a <= n <= b for n, (a, b) in zip(numbers, bounds, strict=True))
        return np.asarray(numbers, dtype=space.dtype).reshape(space.shape) if fits else None
    if isinstance(space, spaces.Box):
        size = int(np.prod(space.shape))
        found = [float(number) for number in _FLOAT.findall(text)[:size]]
        if len(found) != size:
            return None
        values = np.clip(np.asarray(found).reshape(space.shape), space.low, space.high)
        return values.astype(space.dtype)
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return _composed(space, text, name)
    raise UsageError(f"{name} has actions of {space}, which have no words here; give action_parser")


def _composed(space: Any, text: str, name: str) -> Any:
    """Several actions at once, as a JSON object or list in the text."""
    opening, closing = ("{", "}") if isinstance(space, spaces.Dict) else ("[", "]")
    try:
        given = json.loads(text[text.index(opening) : text.rindex(closing) + 1])
    except (ValueError, RecursionError):
        return None
    if isinstance(space, spaces.Dict):
        if set(given) != set(space.spaces):
            return None
        parts = {key: _action(part, _text(given[key]), name) for key, part in space.spaces.items()}
        return None if any(part is None for part in parts.values()) else parts
    if len(given) != len(space.spaces):
        return None
    values = [_action(part, _text(value), name) for part, value in zip(space.spaces, given, strict=True)]
    return None if any(value is None for value in values) else tuple(values)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- masks ------------------------------------------------------------------------------------------------------------


def _mask(space: Any, given: Any) -> Any:
    """Booleans, one for each action. Raises TrainingError for another number of them."""
    try:
        parts = [np.ravel(part) for part in given] if isinstance(given, list | tuple) else [np.ravel(given)]
        flat = np.concatenate(parts) > 0
    except (TypeError, ValueError) as error:
        raise TrainingError(f"the mask of actions is {shown(given)}, and no array ({first_line(error)})") from None
    size = int(space.n) if isinstance(space, spaces.Discrete) else int(np.sum(space.nvec))
    if flat.size != size:
        raise TrainingError(
            f"the mask of actions has {flat.size} entries, and {space} has {size} actions to mask; give one entry for "
            "each action"
        )
    return flat


def _allowed(space: Any, words: Words) -> Callable[[Any], str]:
    names = words.names

    def allowed(given: Any) -> str:
        mask = _mask(space, given)
        if isinstance(space, spaces.Discrete):
            places = np.flatnonzero(mask)
            said = [names[i] if names else str(int(space.start + i)) for i in places]
            return ", ".join(said) or "none"
        ends = np.cumsum(np.ravel(space.nvec))
        firsts = np.ravel(space.start)
        parts = [np.flatnonzero(part) + first for part, first in zip(np.split(mask, ends[:-1]), firsts, strict=True)]
        return "; ".join(" or ".join(map(str, part)) or "none" for part in parts)

    return allowed


def _is_allowed(space: Any) -> Callable[[Any, Any], bool]:
    def is_allowed(given: Any, action: Any) -> bool:
        mask = _mask(space, given)
        if isinstance(space, spaces.Discrete):
            return bool(mask[int(action) - int(space.start)])
        starts = np.concatenate([[0], np.cumsum(np.ravel(space.nvec))[:-1]])
        return bool(mask[starts + np.ravel(action) - np.ravel(space.start)].all())

    return is_allowed


# --- starts -----------------------------------------------------------------------------------------------------------


def random_lake(seed: int, size: int = 4) -> dict[str, Any]:
    """Arguments of FrozenLake-v1: a map of its own for each seed, with ice that is not slippery.

    The maps of even and of odd seeds have none in common, so that what is trained on even seeds can be tried on odd
    ones: one map in ten, by its checksum, belongs to the odd ones.
    """
    for draw in range(1000):
        rows = generate_random_map(size, seed=seed + (draw << 32))
        if held_out("".join(rows)) == bool(seed % 2):
            break
    return {"desc": rows, "is_slippery": False}

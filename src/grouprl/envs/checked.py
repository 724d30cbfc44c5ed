"""One environment, every step of which is checked for what vector environments would convert without a word."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from grouprl.envs.closing import close
from grouprl.envs.env_errors import environment_error
from grouprl.envs.masks import one_mask
from grouprl.errors import GrouprlError, TrainingError, UsageError, with_type

_NUMBERS = (float, np.float64, np.float32, np.int64)
_NO_INFO: dict[str, Any] = {}
_RAISED = (Exception, SystemExit)  # an environment that exits, as when its window is closed, is no end of training


class Checked(gym.Wrapper[Any, Any, Any, Any]):
    """``env``, with each result of ``reset`` and ``step`` checked, and nothing in ``info`` but the mask of actions.

    A vector environment writes what an environment returns into arrays, and NumPy converts there whatever it can: a
    text to a number, NaN to True, one number to all components of an observation. Its infos it joins too, key by key,
    which fails for a key that is now a number and now None. Only the mask is read.

    The mask is ``info["action_mask"]``, else what a method ``action_masks()`` of the environment returns.

    Args:
        env: one environment.
        number: its place among those stepped side by side; named in errors.
        keep_info: leave the rest of ``info`` as it is, because somebody reads it.
        copy_last: the last observation of an episode is a copy, because the environment may be reset before it is seen.

    Raises:
        TypeError: ``env`` is no ``gymnasium.Env``, or its spaces are no spaces of Gymnasium.
    """

    def __init__(
        self, env: gym.Env[Any, Any], number: int = 0, *, keep_info: bool = False, copy_last: bool = False
    ) -> None:
        _check_kind(env)
        super().__init__(env)
        self.number, self._keep_info, self._copy_last = number, keep_info, copy_last
        space = env.observation_space
        self._box = (space.dtype, space.shape) if type(space) is spaces.Box else (None, None)
        self._mask_method = env.get_wrapper_attr("action_masks") if env.has_wrapper_attr("action_masks") else None
        self._mask_size = mask_size(env.action_space)
        self._closed = False
        if self._mask_method is not None and not self._mask_size:
            raise UsageError(
                f"the environment has a method action_masks(), and its action space {env.action_space} takes no masks; "
                "those of Discrete and MultiDiscrete do"
            )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Raises TrainingError if the environment fails, or returns something else than an observation and a dict."""
        try:
            result: Any = self.env.reset(seed=seed, options=options)
        except GrouprlError:
            raise
        except _RAISED as error:
            raise environment_error(error, "in reset", self.number) from error
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise self._broken("reset must return (observation, info), info being a dict", result)
        observation, info = result
        if "action_masks" in info and "action_mask" not in info:
            raise UsageError(
                f"environment {self.number} gives its masks as info['action_masks'], which is not read; name the key "
                "'action_mask'"
            )
        return self._observation(observation, "reset"), self._mask(info, over=False)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Raises TrainingError if the environment fails, or returns what a step must not."""
        try:
            result: Any = self.env.step(action)
        except GrouprlError:
            raise
        except _RAISED as error:
            raise environment_error(error, "in step", self.number) from error
        if type(result) is not tuple or len(result) != 5:
            raise self._broken("step must return (observation, reward, terminated, truncated, info)", result)
        observation, reward, terminated, truncated, info = result
        if type(reward) not in _NUMBERS:
            reward = self._reward(reward)
        if type(terminated) is not bool:
            terminated = self._flag("terminated", terminated)
        if type(truncated) is not bool:
            truncated = self._flag("truncated", truncated)
        dtype, shape = self._box
        if type(observation) is not np.ndarray or observation.dtype is not dtype or observation.shape != shape:
            observation = self._observation(observation, "step")
        if type(info) is not dict and not isinstance(info, Mapping):
            raise self._broken("the info that step returns must be a dict", info)
        over = terminated or truncated
        if over and self._copy_last:
            observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, self._mask(info, over)

    def close(self) -> None:
        """Close it, once. A warning names it where its own ``close`` fails, so that others beside it are closed too."""
        if not self._closed:
            self._closed = True
            close(self.env)

    def _mask(self, info: Mapping[str, Any], over: bool) -> dict[str, Any]:
        if "action_mask" in info:
            given = info["action_mask"]
        elif self._mask_method is not None and not over:  # where an episode is over there may be no valid action
            try:
                given = self._mask_method()
            except _RAISED as error:
                raise environment_error(error, "in action_masks", self.number) from error
        else:
            given = None
        rest = {key: value for key, value in info.items() if key != "action_mask"} if self._keep_info else _NO_INFO
        if given is None:
            return rest
        if not self._mask_size:
            raise UsageError(
                f"info has an action_mask, and the action space {self.action_space} takes no masks; those of Discrete "
                "and MultiDiscrete do"
            )
        try:
            return {**rest, "action_mask": one_mask(given, self._mask_size)}
        except UsageError as error:
            raise UsageError(f"environment {self.number}: {error}") from None

    def _reward(self, reward: Any) -> float:
        if type(reward) is int and abs(reward) < 2**63:
            return float(reward)
        values = _as_array(reward)
        if values is None or values.size != 1 or values.dtype.kind not in "biuf":
            raise self._broken(
                "a reward must be one number (gymnasium.wrappers.TransformReward can make it one)", reward
            )
        return float(values.ravel()[0])

    def _flag(self, name: str, value: Any) -> bool:
        values = _as_array(value)
        if values is None or values.ndim or values.dtype.kind == "f" or values not in (0, 1):
            raise self._broken(f"{name} must be True or False", value)
        return bool(values)

    def _observation(self, observation: Any, moment: str) -> Any:
        try:
            return fitting(self.env.observation_space, observation)
        except _DoesNotFitError as error:
            raise TrainingError(f"environment {self.number}: the observation that {moment} returned {error}") from None

    def _broken(self, rule: str, given: Any) -> TrainingError:
        return TrainingError(f"environment {self.number}: {rule}; it returned {with_type(given)}")


class _DoesNotFitError(ValueError):
    """An observation is not one of its space."""


def fitting(space: spaces.Space[Any], observation: Any, where: str = "") -> Any:
    """``observation``, if it can be put into an array of ``space`` without being changed beyond rounding.

    Bounds are not looked at.

    Raises:
        _DoesNotFitError: it cannot.
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(observation, Mapping) or set(space.spaces) - set(observation):
            wanted = ", ".join(map(repr, space.spaces))
            raise _DoesNotFitError(f"{where}is {with_type(observation)}; its space wants a dict with the keys {wanted}")
        return {key: fitting(part, observation[key], f"{where}at {key!r} ") for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        if not isinstance(observation, tuple | list | np.ndarray) or len(observation) != len(space.spaces):
            raise _DoesNotFitError(
                f"{where}is {with_type(observation)}; its space wants a tuple of {len(space.spaces)}"
            )
        return tuple(fitting(part, observation[i], f"{where}at {i} ") for i, part in enumerate(space.spaces))
    if space.dtype is None or space.shape is None:  # a space of someone else's, which is refused elsewhere
        return observation
    whole = isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)
    values = _as_array(observation)
    if values is None or (space.shape and not hasattr(observation, "__array__")):
        raise _DoesNotFitError(
            f"{where}is {with_type(observation)}; its space {space} wants an array: return "
            f"numpy.asarray(observation, numpy.{space.dtype})"
        )
    if values.shape != space.shape:
        raise _DoesNotFitError(f"{where}has shape {values.shape}; its space {space} wants {space.shape}")
    fits = values.dtype.kind in "biu" if whole else np.can_cast(values.dtype, space.dtype, "same_kind")
    if not fits:
        raise _DoesNotFitError(
            f"{where}has dtype {values.dtype}, which {space.dtype} cannot hold, the dtype of its space {space}; "
            "correct the one or the other"
        )
    return observation if isinstance(observation, np.ndarray | np.generic | int | float) else values


def mask_size(space: spaces.Space[Any]) -> int:
    """Entries of a mask of the actions in ``space``; 0 where there is none."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    return int(space.nvec.sum()) if isinstance(space, spaces.MultiDiscrete) else 0


def _as_array(value: Any) -> np.ndarray[Any, Any] | None:
    """As an array of numbers, or None for what is no number and no array, or where entries are masked out."""
    if np.ma.is_masked(value):
        return None
    try:
        values = np.asarray(value)
    except Exception:  # parts of different lengths, a tensor on a GPU
        return None
    return values if values.dtype.kind in "biuf" else None


def _check_kind(env: Any) -> None:
    if isinstance(env, VectorEnv):
        raise TypeError(f"it is the vector environment {type(env).__name__}; pass that itself: GRPO(venv)")
    if not isinstance(env, gym.Env):
        old = [kind for kind in type(env).__mro__ if kind.__module__.partition(".")[0] == "gym"]
        how = "an environment of the old gym, which shimmy converts (shimmy.GymV26CompatibilityV0)" if old else "none"
        raise TypeError(f"a gymnasium.Env is wanted, and {with_type(env)} is {how}")
    for name in ("observation_space", "action_space"):
        space = getattr(env, name)
        if not isinstance(space, spaces.Space):
            raise TypeError(f"its {name} is {with_type(space)}, and no space of gymnasium.spaces")

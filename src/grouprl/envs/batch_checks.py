"""What a vector environment of somebody's own returns, compared with how many environments it says it holds."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from grouprl.envs.checked import Checked
from grouprl.envs.spaces import ObservationCodec
from grouprl.envs.workers import check_settled
from grouprl.errors import TrainingError, UsageError, with_type

Array = npt.NDArray[Any]
_BOOL = np.dtype(bool)


def check_vector(venv: VectorEnv[Any, Any, Any]) -> None:
    """Raise UsageError if ``venv`` lacks what every vector environment must have, or is closed."""
    n = getattr(venv, "num_envs", None)
    if not isinstance(n, int | np.integer) or n < 1:
        raise UsageError(f"the vector environment has num_envs={n!r}; it must be the number of its environments")
    for name in ("single_observation_space", "single_action_space"):
        space = getattr(venv, name, None)
        if not isinstance(space, spaces.Space):
            raise UsageError(f"the vector environment has {name}={space!r}; it must be the space of one environment")
    if getattr(venv, "closed", False):
        raise UsageError("the vector environment is closed; make a new one")
    check_settled(venv)
    base = venv.unwrapped
    if isinstance(base, SyncVectorEnv | AsyncVectorEnv) and any(base.call("has_wrapper_attr", "action_masks")):
        raise UsageError(
            "its environments have a method action_masks(), which is not asked in a vector environment of yours; pass "
            "the callable that makes one environment, and n_envs=..., or let them give info['action_mask']"
        )
    autoreset_mode(venv)


def autoreset_mode(venv: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """The environment's autoreset mode; with a warning NEXT_STEP, Gymnasium's default, where its metadata does not say.

    Raises:
        UsageError: its metadata name no mode of Gymnasium.
    """
    mode = (venv.metadata or {}).get("autoreset_mode")
    if mode is None:
        warnings.warn(
            f"{type(venv.unwrapped).__name__} does not say when it resets environments whose episode ended; NEXT_STEP "
            "is assumed. Set metadata = {'autoreset_mode': gymnasium.vector.AutoresetMode.NEXT_STEP}, or its own mode",
            stacklevel=2,
        )
        return AutoresetMode.NEXT_STEP
    try:
        return mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)
    except ValueError:
        raise UsageError(
            f"metadata['autoreset_mode'] of the vector environment is {mode!r}; allowed are "
            f"{', '.join(map(str, AutoresetMode))} of gymnasium.vector"
        ) from None


class EachChecked:
    """Within, the environments of a ``SyncVectorEnv`` are :class:`Checked`, before its arrays hold their results.

    Outside they are as they were, because they are the user's own.

    Args:
        venv: a ``SyncVectorEnv``, maybe wrapped.
    """

    def __init__(self, venv: VectorEnv[Any, Any, Any]) -> None:
        self._base = cast(SyncVectorEnv, venv.unwrapped)
        # Wrappers and subclasses may read infos.
        self._keep_info = venv is not self._base or type(venv) is not SyncVectorEnv
        self._own: Any = None
        self._checked: list[gym.Env[Any, Any]] = []

    def __enter__(self) -> None:
        self._own = self._base.envs
        if not self._checked:
            how = {"keep_info": self._keep_info, "copy_last": True}
            self._checked = [Checked(env, i, **how) for i, env in enumerate(self._own)]
        self._base.envs = self._checked

    def __exit__(self, *error: object) -> None:
        self._base.envs = self._own


def checking_each(venv: VectorEnv[Any, Any, Any]) -> AbstractContextManager[None]:
    """What to reset and to step ``venv`` within, again and again: :class:`EachChecked` where it can be."""
    base = venv.unwrapped
    if isinstance(base, SyncVectorEnv) and not all(isinstance(env, Checked) for env in base.envs):
        return EachChecked(venv)
    return nullcontext()


class BatchChecks:
    """Compares each batch with the number of environments; what is right costs three comparisons.

    Args:
        observations: of one environment. n: how many. mode: when environments are reset whose episode ended.
    """

    def __init__(self, observations: ObservationCodec, n: int, mode: AutoresetMode) -> None:
        self._observations, self._n, self._mode = observations, n, mode
        self._shape = (n,)
        self._looks = 2  # at a reset and at a step; afterwards NumPy fails where shapes change

    def outcome(self, rewards: Any, terminated: Any, truncated: Any) -> tuple[Array, Array, Array]:
        """The three as arrays ``[n]``: numbers, and twice booleans.

        Raises:
            TrainingError: one of them has another shape, or holds something else.
        """
        if (
            type(rewards) is type(terminated) is type(truncated) is np.ndarray
            and rewards.shape == terminated.shape == truncated.shape == self._shape
            and terminated.dtype is truncated.dtype is _BOOL
            and rewards.dtype.kind == "f"
        ):
            return rewards, terminated, truncated
        return (
            self._numbers("rewards", rewards), self._booleans("terminated", terminated),
            self._booleans("truncated", truncated),
        )  # fmt: skip

    def batch(self, observations: Any, info: Any) -> None:
        """Check the observations of all environments and the info beside them.

        Raises:
            TrainingError: they are not ``n`` observations of the space, or the info is no dict or contradicts the mode.
        """
        if not isinstance(info, dict):
            raise TrainingError(f"the vector environment returned the info {with_type(info)}; it must be a dict")
        if self._mode is not AutoresetMode.SAME_STEP and ("final_obs" in info or "final_observation" in info):
            raise TrainingError(
                "the vector environment gives the last observations of episodes (final_obs), as one that resets in the "
                f"same step does, and its metadata says {self._mode}; correct metadata['autoreset_mode']"
            )
        if self._looks:
            self._looks -= 1
            try:
                batched = self._observations.is_batched(observations)
            except UsageError as error:
                raise TrainingError(f"the vector environment of {self._n}: {error}") from None
            rows = len(next(iter(self._observations.encode(observations).values()))) if batched else 1
            if not batched or rows != self._n:
                what = f"{rows} observations" if batched else "1 observation without a batch axis"
                raise TrainingError(
                    f"the vector environment says num_envs={self._n} and returned {what}; it must return one for each"
                )

    def final_obs(self, info: Any) -> Any:
        """The last observations of episodes, from the info of an environment that resets in the same step."""
        if "final_obs" not in info:
            raise TrainingError(
                "the vector environment resets in the same step (metadata['autoreset_mode']) and gives no "
                "info['final_obs'], the observations that episodes ended with; give it"
            )
        return info["final_obs"]

    def _numbers(self, name: str, given: Any) -> Array:
        try:
            values = np.asarray(given)
        except Exception:  # parts of different lengths
            values = np.empty(0, object)
        if values.shape != self._shape or values.dtype.kind not in "biuf":
            raise TrainingError(
                f"the vector environment returned {name} {with_type(given)}, of shape {np.shape(values)}; it must "
                f"return an array ({self._n},), one number for each environment"
            )
        return values

    def _booleans(self, name: str, given: Any) -> Array:
        values = self._numbers(name, given)
        if values.dtype.kind == "f" or ((values != 0) & (values != 1)).any():
            raise TrainingError(
                f"the vector environment returned {name} {with_type(given)}; it must hold True or False"
            )
        return values.astype(bool)

"""Stepping a vector environment, whatever its autoreset mode.

Gymnasium resets the environments of a vector in one of three ways, and the steps that remain are the same in each:

- NEXT_STEP: the step after an end only resets and ignores the action. Its row is no step of any episode, so it is not
  in :attr:`Stepper.playing`.
- SAME_STEP: the observation that comes back belongs to the next episode already; the last one of the episode that
  ended is in ``info["final_obs"]``.
- DISABLED: environments that ended are reset here, with ``options={"reset_mask": ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array

from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.batch_checks import BatchChecks, autoreset_mode, checking_each
from grouprl.envs.env_errors import environment_error
from grouprl.envs.masks import many_masks, one_mask
from grouprl.envs.spaces import ObservationCodec
from grouprl.errors import GrouprlError, UsageError

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


class Stepped(NamedTuple):
    """What one step of ``n`` environments gave.

    Attributes:
        rewards: ``[n]``, as the environment gave them; without meaning where an environment only reset.
        terminated: ``[n]``, whether the episode reached a terminal state.
        done: ``[n]``, whether the episode ended, by a terminal state or by a time limit.
        ended: numbers ``[e]`` of the watched environments whose episode ended.
        last: the encoded observations these episodes ended with, each ``[e, ...]``; None if none ended.
    """

    rewards: Array
    terminated: Bools
    done: Bools
    ended: npt.NDArray[np.intp]
    last: dict[str, Array] | None


class Choice(NamedTuple):
    """Actions for ``n`` environments.

    Attributes:
        params: parameters ``[n, K]`` of the distribution they were drawn from, the mask applied.
        mask: the valid actions ``[n, M]``, or None where the environment names none.
        actions: as drawn, ``[n, ...]``; :meth:`grouprl.envs.action_codec.ActionCodec.to_env` makes them ready.
    """

    params: Array
    mask: Bools | None
    actions: Array


class Stepper:
    """Steps ``venv``; knows where it stands and which environments take part in the next step.

    Args:
        venv: the environments; ``n`` of them.
        observations: encodes what they show. actions: their action space.
    """

    def __init__(self, venv: VectorEnv[Any, Any, Any], observations: ObservationCodec, actions: ActionCodec) -> None:
        self.venv, self.observations, self.actions = venv, observations, actions
        self.n = int(venv.num_envs)
        self.mode = autoreset_mode(venv)
        self._checks = BatchChecks(observations, self.n, self.mode)
        self._each_checked = checking_each(venv)
        self._obs: Any = None
        self._info: dict[str, Any] = {}
        self.steps = 0
        """Vector steps and resets so far."""
        self.playing: Bools = np.ones(self.n, bool)
        """``[n]``: the coming step is one of an episode. Elsewhere it only resets."""
        self.masks_in_info = False
        """Whether masks came with the info so far, and not with the observation."""
        self.fresh: Bools = np.ones(self.n, bool)
        """``[n]``: the coming step, where it is one of an episode, is the first."""

    @property
    def started(self) -> bool:
        """Whether :meth:`reset` has been called, and :meth:`forget` not since."""
        return self._obs is not None

    def forget(self) -> None:
        """The environments stand nowhere until the next :meth:`reset`."""
        self._obs = None

    def reset(self, seed: int | list[int] | None) -> None:
        """Begin fresh episodes everywhere, from one seed or from one for each environment.

        Raises:
            UsageError: the vector environment does not take a seed for each environment.
            TrainingError: an environment failed.
        """
        try:
            with self._each_checked:
                self._obs, self._info = self.venv.reset(seed=seed)  # type: ignore[arg-type]  # a list is allowed
        except GrouprlError:
            raise
        except Exception as error:
            if isinstance(seed, list):
                raise UsageError(
                    f"group_size needs a seed per environment, which this vector environment does not take ({error}); "
                    "use vectorization=sync"
                ) from error
            raise environment_error(error, "in reset") from error
        self._checks.batch(self._obs, self._info)
        self.playing, self.fresh = np.ones(self.n, bool), np.ones(self.n, bool)
        self.steps += 1

    def encoded(self) -> dict[str, Array]:
        """The observations now, each ``[n, ...]``. They may be views of memory that the next step overwrites."""
        return self.observations.encode(self._obs)

    def numbers(self) -> npt.NDArray[np.float64]:
        """The numbers of the observations now, ``[n, D]``, as :meth:`ObservationCodec.numbers` gives them."""
        return self.observations.numbers(self._obs)

    def mask(self, playing: Bools) -> Bools | None:
        """Valid actions now, ``[n, M]``, or None where the environment names none.

        They come from the observation's ``action_mask`` or from ``info["action_mask"]``. Rows not in ``playing [n]``
        and rows that name none allow every action.

        Raises:
            UsageError: a mask of another size than the action space, or one that leaves no action.
        """
        mask = self.observations.mask(self._obs)
        named = playing
        if mask is None:
            given = self._info.get("action_mask")
            if given is None:
                return None
            self.masks_in_info = True
            named = playing & np.asarray(self._info.get("_action_mask", playing))
            mask = self._masks_in_info(given, named)
        mask = mask.copy()  # it may be the environment's, which is used again
        mask[~named] = True
        self.actions.distribution.check_mask(mask)
        return mask

    def _masks_in_info(self, given: Any, named: Bools) -> Bools:
        """The masks of all environments, ``[n, M]``, where those ``named [n]`` gave one."""
        size = self.actions.mask_size
        if not isinstance(given, np.ndarray) or given.dtype != object:
            return many_masks(given, self.n, size)
        mask = np.ones((self.n, size), bool)  # Gymnasium's way with masks that are no arrays
        for i in np.flatnonzero(named):
            mask[i] = one_mask(given[i], size)
        return mask

    def choose(self, params: Array, playing: Bools, rng: np.random.Generator | None) -> Choice:
        """Actions from distributions with parameters ``params [n, K]``, invalid ones masked out.

        Args:
            params: of the distribution of each environment's action, ``[n, K]``.
            playing: ``[n]``, the environments whose action counts; elsewhere nothing is masked.
            rng: draws the actions; None takes the most likely ones.

        Raises:
            UsageError: as :meth:`mask`.
        """
        distribution, mask = self.actions.distribution, self.mask(playing)
        if mask is not None:
            params = distribution.apply_mask(params, mask)
        return Choice(params, mask, distribution.mode(params) if rng is None else distribution.sample(params, rng))

    def step(self, env_actions: Any, watched: Bools | None = None) -> Stepped:
        """Step once.

        Args:
            env_actions: one action for each environment, as its space has it.
            watched: ``[n]``, where the last observation of an episode is wanted; None for nowhere.

        Raises:
            TrainingError: an environment failed.
        """
        try:
            with self._each_checked:
                obs, rewards, terminated, truncated, info = self.venv.step(env_actions)
            rewards, terminated, truncated = self._checks.outcome(rewards, terminated, truncated)
            self._checks.batch(obs, info)
            done = np.logical_or(terminated, truncated)
            ended = np.flatnonzero(done & watched) if watched is not None else np.empty(0, np.intp)
            last = self._last(obs, info, ended) if len(ended) else None
            if self.mode is AutoresetMode.DISABLED and done.any():
                rewards, terminated = np.array(rewards), np.array(terminated)  # the reset may clear the environment's
                with self._each_checked:
                    obs, fresh_info = self.venv.reset(options={"reset_mask": done.copy()})
                info = merge_masks(info, fresh_info, done)
        except GrouprlError:
            raise
        except Exception as error:
            raise environment_error(error, "in step") from error
        if self.mode is AutoresetMode.NEXT_STEP:
            self.fresh, self.playing = ~self.playing, ~done
        else:
            self.fresh = done
        self._obs, self._info = obs, info
        self.steps += 1
        return Stepped(rewards, terminated, done, ended, last)

    def _last(self, obs: Any, info: Mapping[str, Any], ended: npt.NDArray[np.intp]) -> dict[str, Array]:
        if self.mode is AutoresetMode.SAME_STEP:
            rows = _rows_of(self.venv.single_observation_space, self._checks.final_obs(info), ended)
            return self.observations.encode(rows)
        return {key: value[ended].copy() for key, value in self.observations.encode(obs).items()}


def merge_masks(info: dict[str, Any], fresh: dict[str, Any], reset: Bools) -> dict[str, Any]:
    """``fresh``, the info of a partial reset, with the masks ``info`` held for the environments that went on.

    Args:
        info: of the step before the reset. fresh: of the reset.
        reset: ``[n]``, the environments that were reset.
    """
    if "action_mask" not in info:
        return fresh
    named = np.asarray(info.get("_action_mask", np.ones(len(reset), bool))) & ~reset
    mask = np.array(info["action_mask"])
    if "action_mask" in fresh:
        named = named | reset
        mask[reset] = np.asarray(fresh["action_mask"])[reset]
    return {**fresh, "action_mask": mask, "_action_mask": named}


def _rows_of(space: Any, final_obs: Any, rows: Array) -> Any:
    """The observations of ``rows`` as one batch, from Gymnasium's object array or from an already batched one."""
    final = np.asarray(final_obs) if not isinstance(final_obs, dict | tuple) else final_obs
    if isinstance(final, np.ndarray) and final.dtype == object:
        items = [final[i] for i in rows]
        return concatenate(space, items, create_empty_array(space, len(items)))  # type: ignore[arg-type]
    if isinstance(final, dict):
        return {key: _rows_of(space[key], final[key], rows) for key in space.spaces}
    if isinstance(final, tuple):
        return tuple(_rows_of(s, f, rows) for s, f in zip(space.spaces, final, strict=True))
    return final[rows]

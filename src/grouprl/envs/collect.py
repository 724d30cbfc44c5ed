"""Collection: step many environments with the current policy.

The loop keeps plain lists of arrays, one entry per vector step; all bookkeeping is done afterwards, in
:func:`grouprl.envs.trace.pack`, for the whole batch at once.

The three autoreset modes of Gymnasium give the same samples here. NEXT_STEP: the step after an end only resets; its
row is no step of any episode and is dropped. SAME_STEP: the last observation comes in ``info["final_obs"]``. DISABLED:
ended environments are reset with ``options={"reset_mask": ...}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array

from grouprl.envs.config import GRPOConfig
from grouprl.envs.policy import Policy
from grouprl.envs.rollout import Rollout
from grouprl.envs.spaces import ActionCodec, ObservationCodec
from grouprl.envs.sticky import sticky_envs
from grouprl.envs.trace import Array, Bools, Trace, check_observations, pack
from grouprl.envs.vector import autoreset_mode, environment_error
from grouprl.errors import TrainingError, UsageError

Act = Callable[[Mapping[str, Array]], Array]
"""From an encoded observation, ``[n, ...]``, to parameters ``[n, K]`` of the action distribution."""

CHECK_EVERY = 16
"""Vector steps between two looks at whether an auto-sized batch is complete."""

HISTORY_LIMIT = 1_000_000
"""Vector steps since the last reset whose actions are remembered, so that a run without checkpoints stays small."""

MAX_EPISODE = 100_000
"""Steps after which an episode that has not ended is taken for one that never will (whole-episode collection)."""


class Collector:
    """Steps a ``VectorEnv`` and turns what happens into :class:`~grouprl.envs.rollout.Rollout` batches."""

    def __init__(
        self,
        venv: VectorEnv[Any, Any, Any],
        observations: ObservationCodec,
        actions: ActionCodec,
        config: GRPOConfig,
        rng: np.random.Generator,
    ) -> None:
        self.venv, self.observations, self.actions, self.config, self.rng = venv, observations, actions, config, rng
        self.n = int(venv.num_envs)
        self.mode = autoreset_mode(venv)
        self.sticky_envs = sticky_envs(config, self.n)
        self._seed: int | list[int] | None = None
        self._obs: Any = None
        self._info: dict[str, Any] = {}
        self._waiting = np.zeros(self.n, bool)  # NEXT_STEP: the coming step only resets
        self._fresh = np.ones(self.n, bool)  # the coming valid step is the first of its episode
        self._elapsed = np.zeros(self.n, np.int64)
        self._return = np.zeros(self.n, np.float64)
        self._last_action: Array | None = None
        self._started_from: int | list[int] | None = None
        self._replayable = True
        self._history: list[Array] = []  # every action since the last reset: repeating them restores the environments

    # --- starting ------------------------------------------------------------------------------------------------
    def restart(self, seed: int | list[int] | None) -> None:
        """Make the next batch begin with fresh episodes drawn from ``seed``, whatever came before."""
        self._seed = seed
        self._obs = None

    def _reset(self, seed: int | list[int] | None) -> None:
        try:
            self._obs, self._info = self.venv.reset(seed=seed)  # type: ignore[arg-type]  # a list is allowed
        except Exception as error:
            if isinstance(seed, list):
                raise UsageError(
                    f"group_size needs a seed per environment, which this vector environment does not take ({error}); "
                    "use vectorization=sync"
                ) from error
            raise environment_error(error, "in reset") from error
        self._waiting = np.zeros(self.n, bool)
        self._fresh = np.ones(self.n, bool)
        self._elapsed[:] = 0
        self._return[:] = 0
        self._last_action = None
        self._started_from, self._history, self._replayable = seed, [], True

    def _start(self) -> None:
        if self._obs is None:
            seed, self._seed = self._seed, None
            self._reset(seed)

    def _new_round(self) -> None:
        """Fresh episodes everywhere; in groups, those of a group from one start."""
        size, self._seed = self.config.group_size, None
        if size is None:
            self._reset(int(self.rng.integers(2**31 - 1)))
        else:
            starts = self.rng.integers(0, 2**31 - 1, self.n // size)
            self._reset([int(s) for s in np.repeat(starts, size)])

    @property
    def steps_since_reset(self) -> int:
        """Vector steps a resumed run would have to repeat; more than ``HISTORY_LIMIT`` if they are no longer known."""
        return len(self._history) if self._replayable else HISTORY_LIMIT + 1

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Where the environments are, as something that can be written down: a seed and the actions since."""
        if self._obs is None:
            return {}, {"seed": self._seed, "replay": False}
        arrays = {"elapsed": self._elapsed.copy(), "episode_return": self._return.copy()}
        if self._history:
            arrays["actions"] = np.stack(self._history)
        return arrays, {"seed": self._started_from, "replay": True}

    def load(self, arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`: reset from the seed and repeat the actions.

        Exact for environments that are deterministic given a seed, as Gymnasium asks of them.
        """
        self.restart(values["seed"])
        if not values["replay"]:
            return
        self._start()
        everywhere = np.ones(self.n, bool)
        for actions in arrays.get("actions", []):
            self._advance(actions, everywhere)
            self._last_action = actions
        self._elapsed, self._return = arrays["elapsed"].copy(), arrays["episode_return"].copy()

    def warm_up(self, policy: Policy, n_steps: int) -> int:
        """Step at random to start the observation statistics of ``policy``; returns the number of steps taken."""
        if not policy.normalize or n_steps == 0:
            return 0
        self._start()
        seed = self.rng.integers(2**31 - 1)
        rows, taken = [], 0
        distribution = self.actions.distribution
        zeros = np.zeros((self.n, distribution.n_params), np.float32)
        for _ in range(max(8, -(-n_steps // self.n))):
            valid = ~self._waiting
            rows.append(self.observations.encode(self._obs)["flat"][valid].copy())
            check_observations({"flat": rows[-1]}, np.flatnonzero(valid), np.full(len(rows[-1]), len(rows) - 1))
            taken += int(valid.sum())
            mask = valid_actions(self.observations, self.actions, self._obs, self._info, valid)
            params = zeros if mask is None else distribution.apply_mask(zeros, mask)
            self._advance(self.actions.to_env(distribution.sample(params, self.rng)), valid)
        policy.observe(np.concatenate(rows))
        self.restart(int(seed))
        return taken

    # --- one vector step -----------------------------------------------------------------------------------------
    def _advance(self, env_actions: Any, valid: Bools) -> tuple[Array, Bools, Bools, Array, dict[str, Array] | None]:
        """Step once.

        Returns rewards, terminated and done ``[n]``, and for the valid rows on which an episode ended: their numbers
        and the encoded observation they ended with.
        """
        if self._replayable and len(self._history) == HISTORY_LIMIT:
            self._replayable, self._history = False, []
        if self._replayable:
            self._history.append(np.array(env_actions))
        try:
            obs, rewards, terminated, truncated, info = self.venv.step(env_actions)
            done = np.logical_or(terminated, truncated)
            ended = np.flatnonzero(done & valid)
            final = None
            if len(ended):
                if self.mode is AutoresetMode.SAME_STEP:
                    final = self.observations.encode(
                        _rows_of(self.venv.single_observation_space, info["final_obs"], ended)
                    )
                else:
                    final = {key: value[ended].copy() for key, value in self.observations.encode(obs).items()}
            if self.mode is AutoresetMode.DISABLED and done.any():
                obs, fresh = self.venv.reset(options={"reset_mask": done.copy()})
                info = merge_masks(info, fresh, done)
        except Exception as error:
            raise environment_error(error, "in step") from error
        if self.mode is AutoresetMode.NEXT_STEP:
            self._fresh, self._waiting = self._waiting, done
        else:
            self._fresh = done
        self._obs, self._info = obs, info
        return rewards, terminated, done, ended, final

    def _step(self, act: Act, trace: Trace, running: Bools, sticky: float) -> Bools:
        valid = running & ~self._waiting
        encoded = {key: value.copy() for key, value in self.observations.encode(self._obs).items()}
        params = act(encoded)
        mask = valid_actions(self.observations, self.actions, self._obs, self._info, valid)
        if mask is None and trace.masks:
            mask = np.ones_like(trace.masks[0])
        if mask is not None:
            params = self.actions.distribution.apply_mask(params, mask)
            trace.masks += [np.ones_like(mask)] * (len(trace.rewards) - len(trace.masks)) + [mask]
        actions = self.actions.distribution.sample(params, self.rng)
        env_actions = self.actions.to_env(actions)
        if sticky > 0:
            repeat = (self.rng.random(self.n) < sticky) & self.sticky_envs & ~self._fresh & valid
            if self._last_action is None or mask is not None:
                repeat = np.zeros(self.n, bool)
            else:
                env_actions = env_actions.copy()
                env_actions[repeat] = self._last_action[repeat]
            self._last_action = env_actions
            trace.repeated.append(repeat)
        rewards, terminated, done, ended, final = self._advance(env_actions, valid)
        if final is not None:
            trace.final_keys.append(len(trace.rewards) * self.n + ended)
            trace.final.append(final)
        trace.encoded.append(encoded)
        trace.actions.append(actions)
        trace.behaviour.append(params)
        trace.rewards.append(np.array(rewards, np.float32))
        trace.terminated.append(np.array(terminated, bool))
        trace.done.append(done)
        trace.valid.append(valid)
        return done

    # --- one batch -----------------------------------------------------------------------------------------------
    def collect(self, policy: Policy, sticky: float = 0.0) -> Rollout:
        """Collect one batch with ``policy``; ``sticky`` is the current probability of repeating an action.

        Raises:
            TrainingError: the environment raised or died, or gave an observation or a reward that is not finite.
        """
        trace, infer = Trace(), policy.inference()

        def act(encoded: Mapping[str, Array]) -> Array:
            return infer(policy.prepare(encoded))

        if self.config.whole_episodes:
            self._collect_episodes(act, trace, sticky)
        else:
            self._collect_segments(act, trace, sticky)
        now = self.observations.encode(self._obs)
        rollout, self._elapsed, self._return = pack(
            trace, policy, now, self._elapsed, self._return, self.config.group_size
        )
        return rollout

    def _collect_segments(self, act: Act, trace: Trace, sticky: float) -> None:
        config = self.config
        if config.reset_each_batch:
            self._new_round()
        self._start()
        running = np.ones(self.n, bool)
        if config.collect == "segments":
            taken = 0
            while taken < config.n_steps * self.n:
                self._step(act, trace, running, sticky)
                taken += int(trace.valid[-1].sum())
        else:
            taken = complete = 0
            while taken < config.max_steps:
                done = self._step(act, trace, running, sticky)
                taken += int(trace.valid[-1].sum())
                complete += int(done.sum())
                if taken >= config.min_steps and len(trace.rewards) % CHECK_EVERY == 0:
                    wanted = config.min_signals
                    if complete >= wanted or trace.signals() >= wanted:
                        break
        trace.rounds = [0] * len(trace.rewards)

    def _collect_episodes(self, act: Act, trace: Trace, sticky: float) -> None:
        taken = round_number = 0
        while round_number == 0 or taken < self.config.min_steps:
            self._new_round()
            running = np.ones(self.n, bool)
            start = len(trace.rewards)
            while running.any():
                done = self._step(act, trace, running, sticky)
                taken += int(trace.valid[-1].sum())
                running &= ~done
                if len(trace.rewards) - start > MAX_EPISODE:
                    raise TrainingError(
                        f"an episode has not ended after {MAX_EPISODE} steps, and whole episodes are asked for; "
                        "use collect=segments with advantage=baseline, or give the environment a time limit"
                    )
            trace.rounds += [round_number] * (len(trace.rewards) - start)
            round_number += 1


def valid_actions(
    observations: ObservationCodec, actions: ActionCodec, obs: Any, info: Mapping[str, Any], valid: Bools
) -> Bools | None:
    """Valid actions now, ``[n, M]``, or None where the environment names none.

    They come from the observation's ``action_mask`` or from ``info["action_mask"]``. Rows not in ``valid [n]`` (they
    only reset) and rows that name none allow every action.

    Raises:
        UsageError: a mask of another size than the action space, or one that leaves no action.
    """
    mask = observations.mask(obs)
    given = valid
    if mask is None:
        if "action_mask" not in info:
            return None
        mask = np.asarray(info["action_mask"])
        given = valid & np.asarray(info.get("_action_mask", valid))
    mask = np.array(mask, bool).reshape(len(valid), -1)
    if mask.shape[1] != actions.mask_size:
        raise UsageError(
            f"action_mask has {mask.shape[1]} entries per environment, the action space has {actions.mask_size} "
            "actions to mask; give one entry per action"
        )
    mask[~given] = True
    actions.distribution.check_mask(mask)
    return mask


def merge_masks(info: dict[str, Any], fresh: dict[str, Any], reset: Bools) -> dict[str, Any]:
    """``fresh``, the info of a partial reset, with the masks ``info`` held for the environments that went on."""
    if "action_mask" not in info:
        return fresh
    given = np.asarray(info.get("_action_mask", np.ones(len(reset), bool))) & ~reset
    mask = np.array(info["action_mask"])
    if "action_mask" in fresh:
        given = given | reset
        mask[reset] = np.asarray(fresh["action_mask"])[reset]
    return {**fresh, "action_mask": mask, "_action_mask": given}


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

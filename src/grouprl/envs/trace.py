"""What one collection saw, and how it becomes packed steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grouprl.envs.policy import Policy
from grouprl.envs.rollout import Rollout
from grouprl.errors import TrainingError

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


@dataclass
class Trace:
    """What one collection saw, one entry per vector step; ``final*``: one per step on which episodes ended."""

    encoded: list[dict[str, Array]] = field(default_factory=list)
    actions: list[Array] = field(default_factory=list)
    behaviour: list[Array] = field(default_factory=list)
    masks: list[Array] = field(default_factory=list)
    repeated: list[Bools] = field(default_factory=list)
    rewards: list[Array] = field(default_factory=list)
    terminated: list[Bools] = field(default_factory=list)
    done: list[Bools] = field(default_factory=list)
    valid: list[Bools] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    final_keys: list[Array] = field(default_factory=list)
    final: list[dict[str, Array]] = field(default_factory=list)

    def signals(self) -> int:
        """Steps with an unusual reward (not the median) plus terminations: events there is something to learn from."""
        valid = np.stack(self.valid)
        rewards = np.stack(self.rewards)[valid]
        unusual = int((rewards != np.median(rewards)).sum())
        return unusual + int(np.stack(self.terminated)[valid].sum())


def pack(
    trace: Trace,
    policy: Policy,
    now: Mapping[str, Array],
    elapsed_before: Array,
    return_before: Array,
    group_size: int | None,
) -> tuple[Rollout, Array, Array]:
    """Pack a trace of ``T`` vector steps of ``n`` environments: environment by environment, each in time.

    Args:
        trace: the steps; rows that are not valid are dropped.
        policy: prepares the inputs.
        now: the encoded observation after the last step, ``[n, ...]``: where a cut episode would go on.
        elapsed_before: steps, and return_before: return, of the episodes in flight when the batch began, ``[n]``.
        group_size: consecutive environments that share a start, or None if the batch is one group.

    Returns:
        The rollout, and elapsed and return of the episodes in flight now.

    Raises:
        TrainingError: an observation or a reward is not finite.
    """
    valid = np.stack(trace.valid)
    order = valid.T
    n_steps, n = valid.shape

    def pick(rows: list[Array]) -> Array:
        return np.stack(rows).swapaxes(0, 1)[order]

    env, time = np.nonzero(order)
    done = pick(trace.done)
    end = done.copy()
    end[np.flatnonzero(np.append(env[1:] != env[:-1], True))] = True
    last = np.flatnonzero(end)
    lengths = np.diff(last, prepend=-1)
    first = last + 1 - lengths
    sample_env, sample_time, sample_done = env[last], time[last], done[last]
    terminated = pick(trace.terminated)[last]
    carries_on = np.append(True, sample_env[1:] != sample_env[:-1])  # an environment's first sample: maybe begun before
    rewards = pick(trace.rewards)

    before = np.where(carries_on, elapsed_before[sample_env], 0)
    elapsed = np.arange(len(env)) - np.repeat(first - before, lengths)
    total_length = before + lengths
    returns = np.add.reduceat(rewards, first, dtype=np.float64)
    returns += np.where(carries_on, return_before[sample_env], 0.0)
    elapsed_after, return_after = elapsed_before.copy(), return_before.copy()
    elapsed_after[sample_env] = np.where(sample_done, 0, total_length)
    return_after[sample_env] = np.where(sample_done, 0.0, returns)
    finished = np.flatnonzero(sample_done)
    finished = finished[np.argsort(sample_time[finished], kind="stable")]

    raw = {key: pick([e[key] for e in trace.encoded]) for key in trace.encoded[0]}
    keys = np.concatenate([*trace.final_keys, n_steps * n + np.arange(n)])
    at = np.searchsorted(keys, np.where(sample_done, sample_time, n_steps) * n + sample_env)
    raw_last = {key: np.concatenate([*(f[key] for f in trace.final), now[key]])[at] for key in raw}
    _check_rewards(rewards, env, time)
    check_observations(raw, env, time)
    check_observations(raw_last, sample_env, sample_time + 1)
    inputs, last_inputs = policy.prepare(raw), policy.prepare(raw_last)
    group = np.zeros_like(last)
    if group_size is not None:
        group = np.asarray(trace.rounds)[sample_time] * (n // group_size) + sample_env // group_size
    repeated = pick(trace.repeated) if trace.repeated else np.zeros(len(env), bool)
    tensor = torch.from_numpy
    rollout = Rollout(
        observed=raw.get("flat"),
        inputs={key: tensor(value) for key, value in inputs.items()},
        last_inputs={key: tensor(value) for key, value in last_inputs.items()},
        actions=tensor(pick(trace.actions)),
        behaviour=tensor(pick(trace.behaviour)),
        mask=tensor(pick(trace.masks)) if trace.masks else None,
        trainable=tensor(~repeated),
        rewards=tensor(rewards),
        elapsed=tensor(elapsed),
        last_elapsed=tensor(total_length),
        lengths=tensor(lengths),
        group=tensor(group),
        terminated=tensor(terminated),
        truncated=tensor(sample_done & ~terminated),
        episode_returns=returns[finished].tolist(),
        episode_lengths=total_length[finished].tolist(),
        episode_envs=sample_env[finished].tolist(),
    )
    return rollout, elapsed_after, return_after


def _check_rewards(rewards: Array, env: Array, time: Array) -> None:
    if not np.isfinite(rewards).all():
        i = int(np.argmin(np.isfinite(rewards)))
        raise TrainingError(
            f"environment {env[i]} returned the reward {rewards[i]} on step {time[i]} of this batch; rewards must be "
            "finite numbers: fix the environment, or wrap it in gymnasium.wrappers.TransformReward"
        )


def check_observations(raw: Mapping[str, Array], env: Array, time: Array) -> None:
    """Raise TrainingError if ``raw [m, ...]`` is not finite, naming environment ``env [m]`` and step ``time [m]``."""
    for value in raw.values():
        if not np.isfinite(value).all():
            i, component = (int(x[0]) for x in np.nonzero(~np.isfinite(value.reshape(len(value), -1))))
            raise TrainingError(
                f"the observation of environment {env[i]} on step {time[i]} of this batch holds "
                f"{value.reshape(len(value), -1)[i, component]} in component {component}; observations must be finite: "
                "fix the environment, or wrap it in gymnasium.wrappers.TransformObservation"
            )

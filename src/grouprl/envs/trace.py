"""What one collection saw, and how it becomes packed steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from grouprl.envs.finite import check_observations, check_rewards
from grouprl.envs.rollout import Rollout
from grouprl.envs.spaces import ObservationCodec
from grouprl.envs.stepper import Array, Bools, Choice, Stepped

Ints = npt.NDArray[np.int64]
Prepare = Callable[[Mapping[str, Array]], dict[str, Array]]
"""From encoded observations, each ``[m, ...]``, to the policy's inputs, each ``[m, ...]``."""


class InFlight(NamedTuple):
    """The episodes that a batch finds under way, or leaves so, each ``[n]``.

    Attributes:
        elapsed: steps so far.
        returns: undiscounted return so far, of rewards as the environment gave them.
        learned: the same, of rewards as learning has them, in float32.
    """

    elapsed: Ints
    returns: npt.NDArray[np.float64]
    learned: npt.NDArray[np.float64]

    @classmethod
    def none(cls, n: int) -> InFlight:
        """``n`` environments whose episodes are about to begin."""
        return cls(np.zeros(n, np.int64), np.zeros(n, np.float64), np.zeros(n, np.float64))


@dataclass
class _Counted:
    """Which rewards came how often in the first ``rows`` vector steps of a trace, and how many terminations.

    A batch is complete once enough rewards are unusual, so few values are distinct as long as it is not.
    """

    rows: int = 0
    terminations: int = 0
    values: Array = field(default_factory=lambda: np.empty(0, np.float32))
    """The distinct rewards in their order, and in ``counts`` how often each came."""
    counts: Ints = field(default_factory=lambda: np.empty(0, np.int64))

    def add(self, rewards: Array, terminated: Bools) -> None:
        """Count ``m`` more steps, by their rewards ``[m]`` and whether the episode terminated ``[m]``."""
        fresh, counts = np.unique(rewards, return_counts=True)
        self.values, place = np.unique(np.concatenate([self.values, fresh]), return_inverse=True)
        every = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.values), np.int64)
        np.add.at(self.counts, place, every)
        self.terminations += int(terminated.sum())

    def unusual(self) -> int:
        """Rewards that are not the median of all, which is NaN where one of them is."""
        total = int(self.counts.sum())
        if not total or np.isnan(self.values[-1]):
            return total
        middle = np.searchsorted(self.counts.cumsum(), [(total - 1) // 2, total // 2], side="right")
        median = np.median(self.values[np.unique(middle)])
        return total - int(self.counts[self.values == median].sum())


@dataclass
class Trace:
    """What one collection saw, one entry per vector step of ``n`` environments, each ``[n, ...]``.

    Attributes:
        encoded: the observations acted on.
        actions: as drawn. behaviour: parameters of the distribution they were drawn from, masks applied.
        masks: the valid actions, or None where the environments named none.
        repeated: where the environment got its last action again; empty where nothing is ever repeated.
        rewards, terminated, done: as in :class:`~grouprl.envs.stepper.Stepped`; rewards in float64.
        valid: where the step was one of an episode that counts.
        rounds: how many times all environments had been reset before, one number per vector step.
        last_keys, last: per vector step on which episodes ended, and for these ``e`` episodes: the number of the step
            times ``n`` plus the environment ``[e]``, and the observations they ended with, each ``[e, ...]``.
    """

    encoded: list[dict[str, Array]] = field(default_factory=list)
    actions: list[Array] = field(default_factory=list)
    behaviour: list[Array] = field(default_factory=list)
    masks: list[Bools | None] = field(default_factory=list)
    repeated: list[Bools] = field(default_factory=list)
    rewards: list[Array] = field(default_factory=list)
    terminated: list[Bools] = field(default_factory=list)
    done: list[Bools] = field(default_factory=list)
    valid: list[Bools] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    last_keys: list[Array] = field(default_factory=list)
    last: list[dict[str, Array]] = field(default_factory=list)
    masked: bool = False
    """Whether any step so far had a mask."""
    _counted: _Counted = field(default_factory=_Counted)

    def add_choice(self, encoded: dict[str, Array], choice: Choice, valid: Bools) -> None:
        """Note what was seen and chosen; :meth:`add_outcome` must follow."""
        self.encoded.append(encoded)
        self.actions.append(choice.actions)
        self.behaviour.append(choice.params)
        self.masks.append(choice.mask)
        self.masked = self.masked or choice.mask is not None
        self.valid.append(valid)

    def add_outcome(self, stepped: Stepped) -> None:
        """Note what came of it."""
        if stepped.last is not None:
            self.last_keys.append(len(self.rewards) * len(stepped.done) + stepped.ended)
            self.last.append(stepped.last)
        self.rewards.append(np.array(stepped.rewards, np.float64))
        self.terminated.append(np.array(stepped.terminated, bool))
        self.done.append(stepped.done)

    @property
    def newest_steps(self) -> int:
        """Steps that the newest vector step added to the batch."""
        return int(self.valid[-1].sum())

    def signals(self) -> int:
        """Steps with an unusual reward (not the median) plus terminations: events there is something to learn from.

        Each call reads only the vector steps that are new since the last one.
        """
        new = slice(self._counted.rows, len(self.rewards))
        if self.rewards[new]:
            valid = np.stack(self.valid[new])
            self._counted.add(_learned(np.stack(self.rewards[new]))[valid], np.stack(self.terminated[new])[valid])
            self._counted.rows = new.stop
        return self._counted.unusual() + self._counted.terminations


def pack(
    trace: Trace,
    now: Mapping[str, Array],
    before: InFlight,
    observations: ObservationCodec,
    prepare: Prepare,
    group_size: int | None,
) -> tuple[Rollout, InFlight]:
    """Pack a trace of ``T`` vector steps of ``n`` environments: environment by environment, each in time.

    Args:
        trace: the steps; rows that are not valid are dropped.
        now: the encoded observation after the last step, each ``[n, ...]``: where a cut episode would go on.
        before: the episodes in flight when the batch began.
        observations: what encoded them.
        prepare: makes the policy's inputs of encoded observations. Collection did so once to act; keeping its results
            beside the raw observations, which the statistics need, would take more memory and no less time.
        group_size: consecutive environments that share a start, or None if the batch is one group.

    Returns:
        The rollout, and the episodes in flight now.

    Raises:
        TrainingError: an observation or a reward is not finite.
    """
    at = _Places.of(trace)
    given = at.pick(trace.rewards)
    rewards = _learned(given)
    check_rewards(rewards, at.env, at.time)
    episodes, after = _account(at, given, rewards, before)
    raw = {key: at.pick([encoded[key] for encoded in trace.encoded]) for key in trace.encoded[0]}
    raw_last = _last_observations(trace, at, now)
    check_observations(observations, raw, at.env, at.time)
    check_observations(observations, raw_last, at.sample_env, at.sample_time + 1)
    terminated = at.pick(trace.terminated)[at.last]
    repeated = at.pick(trace.repeated) if trace.repeated else np.zeros(len(at.env), bool)
    tensor = torch.from_numpy
    rollout = Rollout(
        observed=raw.get("flat"),
        inputs={key: tensor(value) for key, value in prepare(raw).items()},
        last_inputs={key: tensor(value) for key, value in prepare(raw_last).items()},
        actions=tensor(at.pick(trace.actions)),
        behaviour=tensor(at.pick(trace.behaviour)),
        mask=tensor(at.pick(_every_mask(trace))) if trace.masked else None,
        trainable=tensor(~repeated),
        rewards=tensor(rewards),
        elapsed=tensor(episodes.elapsed),
        last_elapsed=tensor(episodes.total_length),
        lengths=tensor(at.lengths),
        group=tensor(_groups(trace, at, group_size)),
        terminated=tensor(terminated),
        truncated=tensor(at.sample_done & ~terminated),
        episode_returns=episodes.returns[episodes.finished].tolist(),
        learned_returns=episodes.learned[episodes.finished].tolist(),
        episode_lengths=episodes.total_length[episodes.finished].tolist(),
        episode_envs=at.sample_env[episodes.finished].tolist(),
        last_observed=raw_last.get("flat"),
    )
    return rollout, after


@dataclass(frozen=True)
class _Places:
    """Where the ``S`` packed steps and the ``N`` samples they form lie in a trace.

    Attributes:
        order: ``[n, T]``, True where a step is kept. env, time: environment and vector step of each, ``[S]``.
        first, last: the packed steps each sample begins and ends with, ``[N]``. lengths: its steps, ``[N]``.
        sample_env, sample_time, sample_done: of the last step of each sample, ``[N]``.
    """

    order: Bools
    env: Ints
    time: Ints
    first: Ints
    last: Ints
    lengths: Ints
    sample_env: Ints
    sample_time: Ints
    sample_done: Bools

    @classmethod
    def of(cls, trace: Trace) -> _Places:
        """A sample ends with its episode, or with the last step of its environment."""
        order = np.stack(trace.valid).T
        env, time = np.nonzero(order)
        done = _pick(trace.done, order)
        end = done.copy()
        end[np.flatnonzero(np.append(env[1:] != env[:-1], True))] = True
        last = np.flatnonzero(end)
        lengths = np.diff(last, prepend=-1)
        return cls(order, env, time, last + 1 - lengths, last, lengths, env[last], time[last], done[last])

    def pick(self, rows: list[Array]) -> Array:
        """The kept ones of ``T`` entries ``[n, ...]``, packed: ``[S, ...]``."""
        return _pick(rows, self.order)


def _pick(rows: list[Array], order: Bools) -> Array:
    return np.stack(rows).swapaxes(0, 1)[order]


class _Episodes(NamedTuple):
    """Samples as parts of episodes: what the episode had before is counted.

    Attributes:
        elapsed: steps since the start of the episode, before each step, ``[S]``.
        total_length, returns, learned: of the episode up to the end of each sample, ``[N]``, as in :class:`InFlight`.
        finished: numbers of the samples that end an episode, in the order in which these ended.
    """

    elapsed: Ints
    total_length: Ints
    returns: npt.NDArray[np.float64]
    learned: npt.NDArray[np.float64]
    finished: Ints


def _learned(rewards: Array) -> Array:
    """Rewards as learning has them, in float32. One that is too large becomes infinite, which is found in pack."""
    with np.errstate(over="ignore"):
        return rewards.astype(np.float32)


def _account(at: _Places, given: Array, rewards: Array, before: InFlight) -> tuple[_Episodes, InFlight]:
    """Steps and returns of the episodes that rewards ``[S]`` belong to, and the episodes in flight afterwards.

    Args:
        given: the rewards as the environment gave them. rewards: as learning has them.
    """
    carries_on = np.append(True, at.sample_env[1:] != at.sample_env[:-1])  # an environment's first sample
    elapsed_before = np.where(carries_on, before.elapsed[at.sample_env], 0)
    total_length = elapsed_before + at.lengths
    returns, learned = (
        np.add.reduceat(each, at.first, dtype=np.float64) + np.where(carries_on, so_far[at.sample_env], 0.0)
        for each, so_far in ((given, before.returns), (rewards, before.learned))
    )
    after = InFlight(before.elapsed.copy(), before.returns.copy(), before.learned.copy())
    # Of several samples of an environment, the assignment keeps the last.
    after.elapsed[at.sample_env] = np.where(at.sample_done, 0, total_length)
    after.returns[at.sample_env] = np.where(at.sample_done, 0.0, returns)
    after.learned[at.sample_env] = np.where(at.sample_done, 0.0, learned)
    elapsed = np.arange(len(at.env)) - np.repeat(at.first - elapsed_before, at.lengths)
    finished = np.flatnonzero(at.sample_done)
    finished = finished[np.argsort(at.sample_time[finished], kind="stable")]
    return _Episodes(elapsed, total_length, returns, learned, finished), after


def _last_observations(trace: Trace, at: _Places, now: Mapping[str, Array]) -> dict[str, Array]:
    """The encoded observation after the last step of each sample, each ``[N, ...]``."""
    n, n_steps = at.order.shape
    keys = np.concatenate([*trace.last_keys, n_steps * n + np.arange(n)])
    found = np.searchsorted(keys, np.where(at.sample_done, at.sample_time, n_steps) * n + at.sample_env)
    return {key: np.concatenate([*(last[key] for last in trace.last), now[key]])[found] for key in now}


def _groups(trace: Trace, at: _Places, group_size: int | None) -> Ints:
    """The group of each sample, ``[N]``."""
    if group_size is None:
        return np.zeros_like(at.last)
    groups_per_round = at.order.shape[0] // group_size
    group: Ints = np.asarray(trace.rounds)[at.sample_time] * groups_per_round + at.sample_env // group_size
    return group


def _every_mask(trace: Trace) -> list[Array]:
    """The mask of each vector step, every action allowed where the environments named none."""
    everything = np.ones_like(next(mask for mask in trace.masks if mask is not None))
    return [everything if mask is None else mask for mask in trace.masks]

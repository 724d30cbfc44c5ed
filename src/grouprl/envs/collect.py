"""Collection: step many environments with the current policy.

The loop keeps plain lists of arrays, one entry per vector step; all bookkeeping is done afterwards, in
:func:`grouprl.envs.trace.pack`, for the whole batch at once. The autoreset modes are the concern of
:class:`grouprl.envs.stepper.Stepper`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.config import GRPOConfig
from grouprl.envs.finite import check_observations, check_params
from grouprl.envs.policy import Policy
from grouprl.envs.rollout import Rollout
from grouprl.envs.rounding import Rounding
from grouprl.envs.spaces import ObservationCodec
from grouprl.envs.step_watch import StepWatch
from grouprl.envs.stepper import Array, Bools, Stepped, Stepper
from grouprl.envs.sticky import sticky_envs
from grouprl.envs.trace import InFlight, Trace, pack
from grouprl.errors import TrainingError

Act = Callable[[Mapping[str, Array], Bools], Array]
"""From an encoded observation, ``[n, ...]``, and the rows that matter, ``[n]``, to parameters ``[n, K]`` of the action
distribution.
"""

CHECK_EVERY = 16
"""Vector steps between two looks at whether an auto-sized batch is complete."""

HISTORY_LIMIT = 1_000_000
"""Vector steps since the last reset whose actions are remembered, so that a run without checkpoints stays small."""

HISTORY_BYTES = 256 * 2**20
"""Bytes of these actions: of large ones fewer are remembered."""

MAX_EPISODE = 100_000
"""Steps after which an episode that has not ended is taken for one that never will (whole-episode collection)."""


_IN_FLIGHT = {"elapsed": "elapsed", "episode_return": "learned", "exact_return": "returns"}
"""What the parts of :class:`~grouprl.envs.trace.InFlight` are called in a checkpoint."""


class Collector:
    """Steps a ``VectorEnv`` and turns what happens into :class:`~grouprl.envs.rollout.Rollout` batches.

    Args:
        venv: the environments; ``n`` of them.
        observations: encodes what they show. actions: their action space.
        config: says how much a batch holds.
        rng: draws actions, and the seeds of episodes that a batch begins with.
    """

    def __init__(
        self,
        venv: VectorEnv[Any, Any, Any],
        observations: ObservationCodec,
        actions: ActionCodec,
        config: GRPOConfig,
        rng: np.random.Generator,
    ) -> None:
        self.venv, self.actions, self.config, self.rng = venv, actions, config, rng
        self.stepper = Stepper(venv, observations, actions)
        self.n = self.stepper.n
        self._watch = StepWatch(venv, lambda: self.stepper.steps, config.env_timeout)
        self.sticky_envs = sticky_envs(self.n)
        self._seed: int | list[int] | None = None
        self._starts_compared = False
        self._in_flight = InFlight.none(self.n)
        self._last_action: Array | None = None
        self._started_from: int | list[int] | None = None
        self._replayable = True
        self._history_bytes = 0
        self._history: list[Array] = []  # every action since the last reset: repeating them restores the environments

    # --- starting ------------------------------------------------------------------------------------------------
    def restart(self, seed: int | list[int] | None) -> None:
        """Make the next batch begin with fresh episodes drawn from ``seed``, whatever came before."""
        self._seed = seed
        self.stepper.forget()

    def _reset(self, seed: int | list[int] | None) -> None:
        self.stepper.reset(seed)
        self._in_flight = InFlight.none(self.n)
        self._last_action = None
        self._started_from, self._history, self._history_bytes, self._replayable = seed, [], 0, True

    def _start(self) -> None:
        if not self.stepper.started:
            seed, self._seed = self._seed, None
            self._reset(seed)

    def _new_round(self) -> None:
        """Fresh episodes everywhere; with groups, the episodes of one group from one start."""
        size, self._seed = self.config.group_size, None
        if size is None:
            self._reset(int(self.rng.integers(2**31 - 1)))
        else:
            starts = self.rng.integers(0, 2**31 - 1, self.n // size)
            self._reset([int(s) for s in np.repeat(starts, size)])
            if not self._starts_compared:
                self._starts_compared = True
                self._compare_starts(size)

    def _compare_starts(self, size: int) -> None:
        """Warn if the episodes of a group, reset from one seed, begin with different observations."""
        for values in self.stepper.encoded().values():
            groups = values.reshape(self.n // size, size, -1)
            if not np.array_equal(groups, np.broadcast_to(groups[:, :1], groups.shape), equal_nan=True):
                warnings.warn(
                    f"group_size={size} compares episodes from one start, but those of a group begin with different "
                    "observations although they were reset from the same seed; let the environment call "
                    "super().reset(seed=seed) first in reset and draw from self.np_random only, not from np.random or "
                    "random",
                    stacklevel=2,
                )
                return

    @property
    def steps_since_reset(self) -> int:
        """Vector steps a resumed run would have to repeat, if they are still known."""
        return len(self._history)

    @property
    def replayable(self) -> bool:
        """Whether the actions since the last reset are known, so that repeating them restores the environments."""
        return self._replayable

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Where the environments are, as something that can be written down: a seed and the actions since."""
        if not self.stepper.started:
            return {}, {"seed": self._seed, "replay": False}
        arrays = {name: getattr(self._in_flight, part).copy() for name, part in _IN_FLIGHT.items()}
        if self._history:
            arrays["actions"] = np.stack(self._history)
        return arrays, {"seed": self._started_from, "replay": True}

    def load(self, arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`: reset from the seed and repeat the actions.

        Exact for environments that are deterministic given a seed, as Gymnasium asks of them.

        Raises LookupError, TypeError or ValueError for what :meth:`state` cannot have given, and TrainingError if an
        environment fails.
        """
        seed = values["seed"]
        if seed is not None:
            seed = [int(number) for number in seed] if isinstance(seed, list) else int(seed)
        self.restart(seed)
        if not values["replay"]:
            return
        arrays = {"exact_return": arrays["episode_return"]} | dict(arrays)  # of a checkpoint that has one return alone
        shapes = {name: arrays[name].shape for name in _IN_FLIGHT}
        if any(shape != (self.n,) for shape in shapes.values()):
            raise ValueError(f"{shapes} are not of {self.n} environments")
        steps = arrays.get("actions", np.zeros((0, self.n)))
        if steps.shape[1:2] != (self.n,):
            raise ValueError(f"the actions {list(steps.shape)} are not of {self.n} environments")
        self._start()
        for actions in steps:
            self._advance(actions.copy())
            self._last_action = actions
        self._in_flight = InFlight(**{part: arrays[name].copy() for name, part in _IN_FLIGHT.items()})

    def warm_up(self, policy: Policy, n_steps: int) -> int:
        """Step at random to start the observation statistics of ``policy``; returns the number of steps taken.

        A warning names a number that changes by less than float32 tells apart where it is.

        Args:
            policy: observes what is seen; it does not act.
            n_steps: how many steps over all environments, about.

        Raises:
            TrainingError: an environment failed, or gave an observation that is not finite.
        """
        if not policy.normalize or n_steps == 0:
            return 0
        with self._restarting_on_failure():
            return self._watch.run(lambda: self._warm_up(policy, n_steps))

    def _warm_up(self, policy: Policy, n_steps: int) -> int:
        self._start()
        seed = self.rng.integers(2**31 - 1)
        rows, taken, rounding = [], 0, Rounding(policy.observations)
        zeros = np.zeros((self.n, self.actions.distribution.n_params), np.float32)
        for _ in range(max(8, -(-n_steps // self.n))):
            playing = self.stepper.playing
            rows.append(self.stepper.encoded()["flat"][playing].copy())
            time = np.full(len(rows[-1]), len(rows) - 1)
            check_observations(policy.observations, {"flat": rows[-1]}, np.flatnonzero(playing), time)
            rounding.add(self.stepper.numbers()[playing])
            taken += int(playing.sum())
            self._advance(self.actions.to_env(self.stepper.choose(zeros, playing, self.rng).actions))
        rounding.warn()
        policy.observe(np.concatenate(rows))
        self.restart(int(seed))
        return taken

    # --- one vector step -----------------------------------------------------------------------------------------
    def _advance(self, env_actions: Any, watched: Bools | None = None) -> Stepped:
        """Step once and remember the actions."""
        if self._replayable and (len(self._history) == HISTORY_LIMIT or self._history_bytes > HISTORY_BYTES):
            self._replayable, self._history, self._history_bytes = False, [], 0
        if self._replayable:
            self._history.append(np.array(env_actions))
            self._history_bytes += self._history[-1].nbytes + 112  # an array's own size
        return self.stepper.step(env_actions, watched)

    def _step(self, act: Act, trace: Trace, running: Bools, sticky: float) -> Bools:
        """Let the policy act once where ``running [n]``; returns where an episode ended, ``[n]``."""
        valid = running & self.stepper.playing
        encoded = {key: value.copy() for key, value in self.stepper.encoded().items()}
        choice = self.stepper.choose(act(encoded, valid), self.stepper.playing, self.rng)
        trace.add_choice(encoded, choice, valid)
        env_actions = self.actions.to_env(choice.actions)
        if sticky > 0:
            env_actions, repeated = self._repeat(env_actions, sticky, valid, may=not trace.masked)
            trace.repeated.append(repeated)
        elif self.config.sticky > 0:  # a later call of learn repeats again
            self._last_action = env_actions.copy()  # the environment may change what it gets
        stepped = self._advance(env_actions, valid)
        trace.add_outcome(stepped)
        return stepped.done

    def _repeat(self, env_actions: Array, probability: float, valid: Bools, *, may: bool) -> tuple[Array, Bools]:
        """Replace some actions by the last ones; returns the actions, and where they were replaced, ``[n]``.

        The first action of an episode is never replaced, and none is unless ``may``: it might not be valid now.
        """
        repeat = (self.rng.random(self.n) < probability) & self.sticky_envs & ~self.stepper.fresh & valid
        if self._last_action is None or not may:
            repeat = np.zeros(self.n, bool)
        else:
            env_actions[repeat] = self._last_action[repeat]
        self._last_action = env_actions.copy()  # the environment may change what it gets
        return env_actions, repeat

    # --- one batch -----------------------------------------------------------------------------------------------
    def collect(self, policy: Policy, sticky: float = 0.0) -> Rollout:
        """Collect one batch with ``policy``; ``sticky`` is the current probability of repeating an action.

        Raises:
            TrainingError: the environment raised or died, or gave an observation or a reward that is not finite.
        """
        with self._restarting_on_failure():
            return self._collect(policy, sticky)

    @contextmanager
    def _restarting_on_failure(self) -> Iterator[None]:
        """Begin fresh episodes after an exception or a Ctrl-C: what was seen of the present ones is lost."""
        try:
            yield
        except BaseException:
            self.restart(int(self.rng.integers(2**31 - 1)))
            raise

    def _collect(self, policy: Policy, sticky: float) -> Rollout:
        trace, infer = Trace(), policy.inference()

        def act(encoded: Mapping[str, Array], valid: Bools) -> Array:
            params = infer(policy.prepare(encoded))
            check_params(params, encoded, policy, valid, f"step {len(trace.rewards)} of this batch")
            return params

        steps = self._collect_episodes if self.config.whole_episodes else self._collect_segments
        self._watch.run(lambda: steps(act, trace, sticky))
        rollout, self._in_flight = pack(
            trace, self.stepper.encoded(), self._in_flight, policy.observations, policy.prepare, self.config.group_size
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
                taken += trace.newest_steps
        else:
            taken = complete = 0
            while taken < config.max_steps:
                done = self._step(act, trace, running, sticky)
                taken += trace.newest_steps
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
                taken += trace.newest_steps
                running &= ~done
                if len(trace.rewards) - start > MAX_EPISODE:
                    raise TrainingError(
                        f"an episode has not ended after {MAX_EPISODE} steps, and whole episodes are asked for; "
                        "use collect=segments with advantage=baseline, or give the environment a time limit"
                    )
            trace.rounds += [round_number] * (len(trace.rewards) - start)
            round_number += 1

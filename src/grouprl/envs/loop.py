"""The loop of training: batches, updates on them, and what a checkpoint must remember between two."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.baseline_memory import parts_of
from grouprl.envs.collect import Collector
from grouprl.envs.config import GRPOConfig
from grouprl.envs.estimate import DEFAULT_HORIZON, OFFERED, Baseline, advantages, has_signal, n_summary
from grouprl.envs.learner import Learner, Steps
from grouprl.envs.policy import Policy
from grouprl.envs.reuse import Reuse
from grouprl.envs.rollout import Rollout
from grouprl.envs.sticky import StickyActions
from grouprl.envs.vector import horizon
from grouprl.errors import UsageError
from grouprl.machine.ranks import ALONE, Ranks
from grouprl.objective.user_functions import NO_USER_FUNCTIONS, UserFunctions, asked_for, check_asked

Metrics = dict[str, float]

RECENT_EPISODES = 100

_BASELINE, _COLLECTOR, _REUSE = "baseline.", "collector.", "reuse."
"""What the names of tensors begin with in a checkpoint."""

RESTART_AFTER = 10
"""Time limits after which a scheduled checkpoint starts fresh episodes: cuts few of them, bounds the replay."""


SKIPPED = {
    "no_signal": "all rewards were equal and no episode ended early",
    "equal_advantages": "all advantages were equal",
    "undone": "its first epoch went too far beyond kl_stop and was undone",
}
"""Why a batch moved no parameter, by the names that :attr:`Loop.skipped` counts them under."""

_NO_SIGNAL_ADVICE = (
    "Check the rewards and the ends of episodes that the environment gives, raise max_steps, or set "
    "skip_without_signal=False"
)
_UNDONE_ADVICE = "Lower learning_rate, or raise kl_stop"


class Seeds(NamedTuple):
    """What actions, minibatches and first states are drawn with."""

    act: np.random.SeedSequence
    shuffle: np.random.SeedSequence
    starts: np.random.SeedSequence


class Loop:
    """What trains a policy on environments, and how far it has come.

    Args:
        policy: what is trained. actions: its action space.
        config: says how. seeds: of all random draws.
        functions: the user's own estimator and surrogate, in the place of the configuration's.
        n_steps: environment steps the policy was trained for before. If there are none, the first batch is preceded by
            a warm-up.
        ranks: the processes that share the environments and the gradients out among them. All else each does alike.
    """

    def __init__(
        self,
        policy: Policy,
        actions: ActionCodec,
        config: GRPOConfig,
        seeds: Seeds,
        functions: UserFunctions = NO_USER_FUNCTIONS,
        n_steps: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.policy, self.actions, self.config, self.ranks = policy, actions, config, ranks
        self.act_rng, self.start_rng = np.random.default_rng(seeds.act), np.random.default_rng(seeds.starts)
        self.learner = Learner(policy, config, np.random.default_rng(seeds.shuffle), functions.surrogate, ranks)
        self.sticky = StickyActions(config.sticky)
        self.baseline: Baseline | None = None
        self._state_of_baseline: dict[str, Tensor] = {}  # loaded before there were environments
        self.reuse = Reuse(config.reuse) if config.reuse > 1 else None
        if self.reuse is not None and functions.advantage is not None:
            raise UsageError(
                f"reuse={config.reuse} needs the values of the baseline for earlier steps, and advantage_function "
                "takes its place; set reuse=1"
            )
        self.functions = functions
        self.collector: Collector | None = None
        self.horizon = DEFAULT_HORIZON
        """Time limit of one episode of the environments attached, in steps, or what stands for it."""
        self.on_batch: list[Callable[[Rollout, Tensor, float], None]] = []
        """Each is told of a batch that is learned from, its advantages ``[S]`` and its discount, before the update."""
        self.n_steps = n_steps
        """Environment steps so far, those of the warm-up included."""
        self.seconds, self.untimed_steps = 0.0, n_steps
        """Of collecting and learning, so far; and the steps before, which they do not cover."""
        self.signal_steps = n_steps  # what a saved policy was trained for counts in full
        self.batches = 0
        """Collected so far."""
        self.skipped: Counter[str] = Counter()
        """Those of them that moved no parameter, by the names of :data:`SKIPPED`."""
        self.recent_returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self.recent_lengths: deque[int] = deque(maxlen=RECENT_EPISODES)

    def attach(self, venv: VectorEnv[Any, Any, Any]) -> None:
        """Collect from ``venv`` from now on, fresh episodes first."""
        observations = self.policy.observations
        self.collector = Collector(venv, observations, self.actions, self.config, self.act_rng)
        self.restart_episodes()
        own = self.functions.advantage
        check_asked(own, OFFERED)
        fits = "values" in asked_for(own) if own is not None else self.config.advantage == "baseline"
        self.horizon = horizon(venv) or DEFAULT_HORIZON
        if fits and self.baseline is None:
            width = n_summary(observations.n_flat, dict(observations.images))
            self.baseline = Baseline.create(width, self.config, self.horizon)
            self.baseline.load(self._state_of_baseline)
        elif self.baseline is not None:
            self.baseline.horizon = self.horizon

    def detach(self) -> None:
        """Forget the environments; training on needs :meth:`attach` first."""
        self.collector = None

    def forget_batches(self) -> None:
        """Learn nothing more from earlier batches, as where they came from another environment."""
        if self.baseline is not None:
            self.baseline.memory.clear()
        if self.reuse is not None:
            self.reuse.clear()

    def forget_episodes(self) -> None:
        """Report no more returns and lengths of earlier episodes, as where they are another environment's."""
        self.recent_returns.clear()
        self.recent_lengths.clear()

    def restart_episodes(self) -> None:
        """Begin the next batch with fresh episodes, as it must where someone else has stepped the environment."""
        if self.collector is not None:
            self.collector.restart(int(self.start_rng.integers(2**31 - 1)))

    def bound_replay(self, may_restart: bool) -> None:
        """Begin fresh episodes if repeating all actions since the last reset would take too long, or cannot be done.

        If the next batch begins with fresh episodes already, as after another checkpoint of the same step, they stay
        the ones that were drawn.

        Args:
            may_restart: too long counts, not only what cannot be done.
        """
        assert self.collector is not None
        if not self.collector.stepper.started:
            return
        since = self.collector.steps_since_reset
        far = since > RESTART_AFTER * self.horizon
        if (may_restart and far) or not self.collector.replayable:
            self.restart_episodes()

    @torch.inference_mode(False)  # what is collected is differentiated
    def iterate(self, progress: float) -> Metrics:
        """Collect a batch, learn from it, and say what happened; ``progress`` in [0, 1] drives the schedules.

        Raises:
            TrainingError: the environment failed or a number stopped being finite; the parameters stay as they were
                after the last good gradient step.
            UsageError: someone has replaced the policy's parameters, or changed their type.
        """
        began = perf_counter()
        self.learner.parameters.check()
        self.learner.optimizer.raise_to_floors()
        config, collector = self.config, self.collector
        assert collector is not None
        if self.n_steps == 0:
            self.n_steps += collector.warm_up(self.policy, config.warmup_steps)
        used = progress
        if config.skip_without_signal:  # only what carried a signal counts as used
            used *= self.signal_steps / max(self.n_steps, 1)
        sticky, learning_rate = self.sticky.probability(used), self.learner.rate(progress)
        rollout = collector.collect(self.policy, sticky)
        collected = perf_counter()
        self.n_steps += rollout.n_steps
        self.recent_returns.extend(rollout.episode_returns)
        self.recent_lengths.extend(rollout.episode_lengths)
        metrics = self._describe(rollout)
        self.batches += 1
        now = config.at(progress)
        reason, learned = self._learn(rollout, now, progress)
        if reason is not None:
            self.skipped[reason] += 1
        metrics |= {"skipped_batches": self.skipped.total()} | learned
        if rollout.observed is not None:
            self.policy.observe(rollout.observed)
        if sticky > 0:
            self.sticky.judge(rollout, collector.sticky_envs)
        seconds = perf_counter() - began
        self.seconds += seconds
        if config.gamma_final is not None:
            metrics["gamma"] = now.gamma
        metrics |= {
            "learning_rate": learning_rate,
            "sticky": sticky,
            "time_collect": collected - began,
            "train_seconds": self.seconds,
            "steps_per_second": rollout.n_steps / seconds,
        }
        return metrics

    def _learn(self, rollout: Rollout, config: GRPOConfig, progress: float) -> tuple[str | None, Metrics]:
        """Learn from a batch by the settings of its time, :meth:`GRPOConfig.at`.

        Returns:
            Why it moved no parameter (a name of :data:`SKIPPED`, or None), and metrics.
        """
        began = perf_counter()
        if config.skip_without_signal and not has_signal(rollout):
            return "no_signal", {}
        advantage, metrics = advantages(rollout, config, self.baseline, self.functions.advantage)
        equal = config.skip_without_signal and not bool(advantage.any())
        learned: Steps = rollout
        if self.reuse is not None and self.baseline is not None and not equal:
            learned, advantage, reused = self.reuse.join(rollout, advantage, self.policy, self.baseline.values, config)
            metrics = metrics | reused
        estimated = perf_counter()
        metrics = metrics | {"time_advantages": estimated - began}
        for tell in self.on_batch:
            tell(rollout, advantage[: rollout.n_steps], config.gamma)
        if self.on_batch:
            estimated = perf_counter()
        if equal:
            return "equal_advantages", metrics
        self.signal_steps += rollout.n_steps
        stats = self.learner.learn(learned, advantage, progress)
        metrics |= {key: float(value) for key, value in asdict(stats).items() if key != "undone"}
        if self.learner.agreement.last is not None:
            metrics["agreement"] = self.learner.agreement.last
        return "undone" if stats.undone else None, metrics | {"time_update": perf_counter() - estimated}

    def say_skipped(self, since: Counter[str] | None = None, batches: int = 0) -> str | None:
        """A sentence about the batches that moved no parameter, or None where there are none.

        Args:
            since, batches: what :attr:`skipped` and :attr:`batches` were where the count is to begin.
        """
        skipped, n = self.skipped - (since or Counter()), self.batches - batches
        if not skipped:
            return None
        counted = [f"{count} because {SKIPPED[name]}" for name, count in skipped.items()]
        reasons = f", because {SKIPPED[next(iter(skipped))]}" if len(skipped) == 1 else f": {'; '.join(counted)}"
        if skipped.total() < n:
            usual = ", which is usual once a task is solved" if set(skipped) == {"no_signal"} else ""
            return f"{skipped.total()} of {n} batches moved no parameter{reasons}{usual}"
        advice = [_NO_SIGNAL_ADVICE] if set(skipped) - {"undone"} else []
        advice += [_UNDONE_ADVICE] if "undone" in skipped else []
        return f"nothing was learned, none of {n} batches moved a parameter{reasons}. {'. '.join(advice)}"

    def _describe(self, rollout: Rollout) -> Metrics:
        distribution = self.policy.distribution
        recent = np.asarray(self.recent_returns, float)
        spread = {"policy_std": float(self.policy.log_std.detach().exp().mean())} if self.policy.gaussian else {}
        return {
            "update": self.learner.updates + 1,
            "step": self.n_steps,
            "return_mean": float(recent.mean()) if len(recent) else float("nan"),
            "return_batch": float(np.mean(rollout.episode_returns)) if rollout.episode_returns else float("nan"),
            "length_mean": float(np.mean(self.recent_lengths)) if self.recent_lengths else float("nan"),
            "episodes": len(rollout.episode_returns),
            "batch_steps": rollout.n_steps,
            "policy_entropy": float(distribution.entropy(rollout.behaviour).mean()),
            **spread,
            "reward_mean": float(rollout.rewards.mean()),
        }

    # --- state -------------------------------------------------------------------------------------------------------
    def _streams(self) -> dict[str, np.random.Generator]:
        return {"act": self.act_rng, "starts": self.start_rng, "shuffle": self.learner.rng}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs besides the policy and ``n_steps``: tensors, and the rest as JSON."""
        assert self.collector is not None
        tensors, state = self.state_without_environments()
        arrays, state["collector"] = self.collector.state()
        return tensors | {_COLLECTOR + key: torch.from_numpy(value) for key, value in arrays.items()}, state

    def state_without_environments(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """:meth:`state`, but where the environments are."""
        tensors, learner = self.learner.state()
        baseline = self._state_of_baseline if self.baseline is None else self.baseline.state()
        tensors |= {_BASELINE + name: value for name, value in baseline.items()}
        if self.reuse is not None:
            tensors |= {_REUSE + name: value for name, value in self.reuse.state().items()}
        counters = {
            "train_seconds": self.seconds,
            "untimed_steps": self.untimed_steps,
            "signal_steps": self.signal_steps,
            "batches": self.batches,
            "skipped": dict(self.skipped),
            "recent_returns": list(self.recent_returns),
            "recent_lengths": list(self.recent_lengths),
        }
        return tensors, {
            "learner": learner,
            "rng": {name: rng.bit_generator.state for name, rng in self._streams().items()},
            "sticky": self.sticky.state(),
            "counters": counters,
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`; the policy must have been loaded and the environments attached before."""
        assert self.collector is not None
        self.load_without_environments(tensors, state)
        arrays = {key: value.numpy() for key, value in parts_of(tensors, _COLLECTOR).items()}
        self.collector.load(arrays, state["collector"])

    def load_without_environments(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_without_environments`; the policy must have been loaded before."""
        self._state_of_baseline = parts_of(tensors, _BASELINE)
        if self.baseline is not None:
            self.baseline.load(self._state_of_baseline)
        if self.reuse is not None:
            self.reuse.load(parts_of(tensors, _REUSE))
        self.learner.load(tensors, state["learner"])
        for name, rng in self._streams().items():
            rng.bit_generator.state = state["rng"][name]
        self.sticky.load(state["sticky"])
        counters = state["counters"]
        self.seconds, self.signal_steps = counters["train_seconds"], counters["signal_steps"]
        self.untimed_steps = counters["untimed_steps"]
        self.batches, self.skipped = counters["batches"], Counter(counters["skipped"])
        self.recent_returns.extend(map(float, counters["recent_returns"]))
        self.recent_lengths.extend(map(int, counters["recent_lengths"]))

"""Evaluation: complete episodes, raw rewards, frozen statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from grouprl.envs.arguments import whole_number
from grouprl.envs.finite import check_observations, check_params, check_rewards
from grouprl.envs.grpo import GRPO
from grouprl.envs.loading import chosen_environment
from grouprl.envs.step_watch import StepWatch
from grouprl.envs.stepper import Stepper
from grouprl.envs.vector import EnvLike, horizon, is_vectorised, make_vector, share_environments
from grouprl.envs.workers import close_vector
from grouprl.errors import UsageError, with_type
from grouprl.machine.threads import single_threaded_kernels

MAX_STEPS = 100_000
"""Steps after which an episode is cut where no time limit is known: a greedy policy may run in circles for ever."""

LEAST_PATIENCE = 5000
"""Least steps of a greedy episode that is cut for want of an end."""


def longest(limit: int | None) -> int:
    """Where to cut an episode if nobody says: after ``MAX_STEPS``, and nowhere below a time ``limit`` that is known.

    With a time limit the environment ends its episodes there by itself, or never had that limit.
    """
    return max(MAX_STEPS, 2 * (limit or 0))


def patience(agent: GRPO, limit: int | None) -> int | None:
    """Steps after which a greedy episode of ``agent`` is taken for one that never ends.

    It is ten times the longest of the last episodes of training, and at least ``LEAST_PATIENCE``. None where the
    environment has a time ``limit``, because it ends its episodes itself, and where no episode of training has ended.
    """
    lengths = agent.loop.recent_lengths
    if not lengths or limit is not None:
        return None
    return max(LEAST_PATIENCE, 10 * max(lengths))


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of episodes: complete ones, but for the last steps of ``cut`` of them."""

    returns: list[float]
    lengths: list[int]
    cut: int = 0
    """Episodes that had not ended after ``max_steps`` and count with what they had returned by then."""

    def summary(self) -> dict[str, float]:
        """episodes, mean_return, std_return (over episodes, ddof 0), min, max, mean_length, cut."""
        returns = np.asarray(self.returns)
        return {
            "episodes": len(returns),
            "mean_return": float(returns.mean()),
            "std_return": float(returns.std()),
            "min": float(returns.min()),
            "max": float(returns.max()),
            "mean_length": float(np.mean(self.lengths)),
            "cut": self.cut,
        }


class Evaluator:
    """Holds environments of its own, so that evaluating never disturbs training.

    Every environment plays a fixed share of the episodes, so that short ones are not counted more often than long ones.

    Args:
        env, n_envs, vectorization, env_kwargs, timeout: as for :func:`~grouprl.envs.vector.make_vector`.
        max_steps: where to cut an episode that has not ended; default: nowhere if the environment has a time limit,
            else after ``MAX_STEPS``.

    Raises:
        UsageError: there is no such environment, or ``max_steps`` is below 1.
    """

    def __init__(
        self,
        env: EnvLike,
        env_kwargs: Mapping[str, Any] | None = None,
        n_envs: int = 16,
        vectorization: str = "auto",
        max_steps: int | None = None,
        timeout: float | None = None,
    ) -> None:
        if max_steps is not None:
            max_steps = whole_number("max_steps", max_steps, least=1)
        how = "auto" if vectorization == "async" else vectorization
        self.venv = make_vector(env, n_envs, how, env_kwargs, seed=12345, timeout=timeout)
        self.horizon = horizon(self.venv)
        """Time limit of one episode in steps, or None if there is none to be known."""
        self.max_steps = max_steps or longest(self.horizon)

    def run(self, agent: GRPO, episodes: int = 100, deterministic: bool = True, seed: int = 0) -> Evaluation:
        """Play ``episodes`` with the agent's policy, from starts drawn from ``seed``.

        Raises:
            UsageError: the environment has other spaces than the policy.
            TrainingError: the environment failed, or a number stopped being finite.
        """
        with single_threaded_kernels():
            return self._run(agent, episodes, deterministic, seed)

    def _run(self, agent: GRPO, episodes: int, deterministic: bool, seed: int) -> Evaluation:
        venv = self.venv
        if (venv.single_observation_space, venv.single_action_space) != (agent.observation_space, agent.action_space):
            raise UsageError(
                f"the environment has the spaces {venv.single_observation_space} and {venv.single_action_space}, the "
                f"policy {agent.observation_space} and {agent.action_space}; evaluate it where they are the same"
            )
        stepper = Stepper(venv, agent.observations, agent.actions)
        watch = StepWatch(venv, lambda: stepper.steps, agent.config.env_timeout)
        rng = np.random.default_rng(seed) if not deterministic else None
        return watch.run(lambda: self._play(stepper, agent, episodes, rng, seed))

    def _play(
        self, stepper: Stepper, agent: GRPO, episodes: int, rng: np.random.Generator | None, seed: int
    ) -> Evaluation:
        """Play with actions drawn by ``rng``, or with the most likely ones if that is None."""
        n = self.venv.num_envs
        infer = agent.policy.inference()
        left = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
        returns: list[float] = []
        lengths: list[int] = []
        total, length = np.zeros(n), np.zeros(n, np.int64)
        waiting, cut, resets = np.zeros(n, bool), 0, 0
        stepper.reset(seed)
        while left.any():
            playing = stepper.playing & ~waiting
            encoded = stepper.encoded()
            shown = {key: value[playing] for key, value in encoded.items()}
            check_observations(agent.observations, shown, np.flatnonzero(playing), length[playing])
            params = infer(agent.policy.prepare(encoded))
            check_params(params, encoded, agent.policy, playing, "a step of the episode")
            actions = stepper.choose(params, stepper.playing, rng).actions
            stepped = stepper.step(agent.actions.to_env(actions))
            rewards = np.where(playing, stepped.rewards, 0.0)
            check_rewards(rewards, np.arange(n), length, "the episode")
            total += rewards
            length += playing
            too_long = playing & ~stepped.done & (length >= self.max_steps)
            over = playing & stepped.done | too_long
            for i in np.flatnonzero(over & (left > 0)):
                returns.append(float(total[i]))
                lengths.append(int(length[i]))
                left[i] -= 1
                cut += int(too_long[i])
            total[over], length[over] = 0.0, 0
            # An environment alone cannot be made to begin anew. One whose episode was cut waits for the others.
            waiting |= too_long
            if left.any() and not left[~waiting].any():
                resets += 1
                waiting[:] = False
                total[:], length[:] = 0.0, 0
                stepper.reset(seed + resets * n)
        return Evaluation(returns, lengths, cut)

    def close(self) -> None:
        """Close the environments; a warning names one that cannot be closed."""
        close_vector(self.venv)


def evaluate(
    agent: GRPO,
    env: EnvLike | None = None,
    episodes: int = 100,
    *,
    deterministic: bool = True,
    seed: int = 0,
    env_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
) -> Evaluation:
    """Play complete episodes with ``agent`` and return what they returned.

    Args:
        agent: a trained (or not) :class:`~grouprl.envs.grpo.GRPO`.
        env: where; default: what the agent was trained on, made by EnvPool if it was, else one by one, so that rewards
            are raw.
        env_kwargs: for its constructor, for ids; without ``env`` for the id that the agent was trained on.
        episodes: how many.
        deterministic: greedy actions; else sampled ones.
        seed: of the starts (and of the sampled actions).
        max_steps: where to cut an episode that has not ended; default: nowhere if the environment has a time limit,
            else after ``MAX_STEPS``. The result says how many were cut.

    Raises:
        UsageError: no environment to make, no agent, or a number that is not whole or too small.
        TrainingError: the environment failed, or an observation, a reward or the policy is not finite.
    """
    if not isinstance(agent, GRPO):
        raise UsageError(f"evaluate takes an agent, such as GRPO.load(path), and was given {with_type(agent)}")
    episodes, seed = whole_number("episodes", episodes, least=1), whole_number("seed", seed, least=0)
    target, kwargs, how = chosen_environment(agent, env, env_kwargs)
    n_envs = max(1, min(episodes, 100 if how == "auto" and is_vectorised(target, kwargs) else 16))
    evaluator = Evaluator(target, kwargs, n_envs, how, max_steps, agent.config.env_timeout)
    try:
        return evaluator.run(agent, episodes, deterministic, seed)
    finally:
        if not isinstance(target, gym.Env | VectorEnv):
            evaluator.close()
        elif (venv := agent._held.venv) is not None and share_environments(target, venv):
            agent.restart_episodes()

"""Evaluation: complete episodes, raw rewards, frozen statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv

from grouprl.envs.grpo import GRPO
from grouprl.envs.stepper import Stepper
from grouprl.envs.vector import EnvLike, horizon, is_vectorised, make_vector, share_environments
from grouprl.errors import UsageError
from grouprl.machine.threads import single_threaded_kernels

MAX_STEPS = 5000
"""Where an environment has no time limit, a greedy policy that runs in circles would never end an episode."""


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of complete episodes."""

    returns: list[float]
    lengths: list[int]

    def summary(self) -> dict[str, float]:
        """episodes, mean_return, std_return (over episodes, ddof 0), min, max, mean_length."""
        returns = np.asarray(self.returns)
        return {
            "episodes": len(returns),
            "mean_return": float(returns.mean()),
            "std_return": float(returns.std()),
            "min": float(returns.min()),
            "max": float(returns.max()),
            "mean_length": float(np.mean(self.lengths)),
        }


class Evaluator:
    """Holds environments of its own, so that evaluating never disturbs training.

    Every environment plays a fixed share of the episodes, so that short ones are not counted more often than long ones.
    """

    def __init__(
        self, env: EnvLike, env_kwargs: Mapping[str, Any] | None = None, n_envs: int = 16, vectorization: str = "auto"
    ) -> None:
        how = "auto" if vectorization == "async" else vectorization
        self.venv = make_vector(env, n_envs, how, env_kwargs, seed=12345)
        if horizon(self.venv) is None and isinstance(env, str) and isinstance(self.venv, SyncVectorEnv):
            self.venv.close()
            self.venv = make_vector(env, n_envs, how, {**(env_kwargs or {}), "max_episode_steps": MAX_STEPS})
        elif horizon(self.venv) is None and not isinstance(env, gym.Env | VectorEnv | str):
            from gymnasium.wrappers import TimeLimit

            self.venv.close()
            self.venv = make_vector(lambda: TimeLimit(env(), MAX_STEPS), n_envs, how)

    @property
    def step_limit(self) -> int:
        """Steps after which an episode is cut: the environment's own limit, or ``MAX_STEPS`` if it has none."""
        return horizon(self.venv) or MAX_STEPS

    def run(self, agent: GRPO, episodes: int = 100, deterministic: bool = True, seed: int = 0) -> Evaluation:
        """Play ``episodes`` with the agent's policy, from starts drawn from ``seed``.

        Raises:
            UsageError: fewer than one episode.
            TrainingError: the environment failed.
        """
        with single_threaded_kernels():
            return self._run(agent, episodes, deterministic, seed)

    def _run(self, agent: GRPO, episodes: int, deterministic: bool, seed: int) -> Evaluation:
        if episodes < 1:
            raise UsageError(f"episodes={episodes} must be at least 1")
        venv = self.venv
        if (venv.single_observation_space, venv.single_action_space) != (agent.observation_space, agent.action_space):
            raise UsageError(
                f"the environment has the spaces {venv.single_observation_space} and {venv.single_action_space}, the "
                f"policy {agent.observation_space} and {agent.action_space}; evaluate it where they are the same"
            )
        return self._play(agent, episodes, np.random.default_rng(seed) if not deterministic else None, seed)

    def _play(self, agent: GRPO, episodes: int, rng: np.random.Generator | None, seed: int) -> Evaluation:
        """Play with actions drawn by ``rng``, or with the most likely ones if that is None."""
        n, limit = self.venv.num_envs, self.step_limit
        stepper = Stepper(self.venv, agent.observations, agent.actions)
        infer = agent.policy.inference()
        left = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
        returns: list[float] = []
        lengths: list[int] = []
        total, length = np.zeros(n), np.zeros(n, np.int64)
        stepper.reset(seed)
        while left.any():
            playing = stepper.playing
            params = infer(agent.policy.prepare(stepper.encoded()))
            actions = stepper.choose(params, playing, rng).actions
            stepped = stepper.step(agent.actions.to_env(actions))
            total += np.where(playing, stepped.rewards, 0.0)
            length += playing
            over = stepped.done | (length >= limit)
            for i in np.flatnonzero(over & (left > 0)):
                returns.append(float(total[i]))
                lengths.append(int(length[i]))
                left[i] -= 1
            total[over], length[over] = 0.0, 0
        return Evaluation(returns, lengths)

    def close(self) -> None:
        """Close the environments."""
        self.venv.close()


def evaluate(
    agent: GRPO,
    env: EnvLike | None = None,
    episodes: int = 100,
    *,
    deterministic: bool = True,
    seed: int = 0,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Play complete episodes with ``agent`` and return what they returned.

    Args:
        agent: a trained (or not) :class:`~grouprl.envs.grpo.GRPO`.
        env: where; default: what the agent was trained on.
        episodes: how many.
        deterministic: greedy actions; else sampled ones.
        seed: of the starts (and of the sampled actions).

    Raises:
        UsageError: no environment to make, fewer than one episode.
    """
    target, kwargs = (env, env_kwargs) if env is not None else agent.where()
    evaluator = Evaluator(target, kwargs, n_envs=max(1, min(episodes, 100 if is_vectorised(target, kwargs) else 16)))
    try:
        return evaluator.run(agent, episodes, deterministic, seed)
    finally:
        if isinstance(target, str) or callable(target):
            evaluator.close()
        elif (venv := agent.get_env()) is not None and share_environments(target, venv):
            agent.restart_episodes()

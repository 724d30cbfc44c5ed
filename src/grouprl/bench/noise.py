"""Noise on the rewards of training, for benchmarks that ask how well a method bears it; evaluations have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import gymnasium as gym
import numpy as np

from grouprl.envs.vector import find_spec

Env = gym.Env[Any, Any]


class NoisyReward(gym.RewardWrapper[Any, Any]):
    """Adds independent Gaussian noise with standard deviation ``sigma`` to every reward."""

    def __init__(self, env: Env, sigma: float, stream: tuple[int, int]) -> None:
        super().__init__(env)
        self.sigma, self._random = sigma, np.random.default_rng(stream)

    def reward(self, reward: Any) -> float:
        """One reward with noise; a reset does not begin the noise again, so that equal starts differ in it."""
        return float(reward) + self.sigma * float(self._random.standard_normal())


def noisy(sigma: float, seed: int) -> Callable[[Env], Env]:
    """A wrapper for the environments of one run: each that it is given gets noise of its own.

    Args:
        sigma: the standard deviation, in the units of the reward. seed: of the run.
    """
    number = count()
    return lambda env: NoisyReward(env, sigma, (seed, next(number)))


def noisy_maker(env_id: str, env_kwargs: Mapping[str, Any], sigma: float, seed: int) -> Callable[[], Env]:
    """What makes such environments one by one, for :class:`~grouprl.envs.grpo.GRPO`."""
    find_spec(env_id)  # it registers what Gymnasium does not know
    wrap = noisy(sigma, seed)
    return lambda: wrap(gym.make(env_id, **env_kwargs))

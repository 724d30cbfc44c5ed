"""Stable-Baselines3's PPO with RL-Zoo's settings on one environment, in a fresh process; run by envs_noise.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

import measuring


def value_of(setting: Any) -> Any:
    """RL-Zoo's ``lin_x``: from x to 0 over the run; its name of an activation; anything else as it is."""
    if isinstance(setting, dict) and "activation_fn" in setting:
        return {**setting, "activation_fn": getattr(torch.nn, setting["activation_fn"])}
    if not (isinstance(setting, str) and setting.startswith("lin_")):
        return setting
    first = float(setting.removeprefix("lin_"))
    schedule: Callable[[float], float] = lambda remaining: remaining * first  # noqa: E731
    return schedule


class NoisyReward(gym.RewardWrapper):  # type: ignore[type-arg]
    """Adds N(0, sigma^2) to every reward."""

    def __init__(self, env: gym.Env[Any, Any], sigma: float, seed: int) -> None:
        super().__init__(env)
        self.sigma, self.rng = sigma, np.random.default_rng(seed)

    def reward(self, reward: Any) -> float:
        return float(reward + self.sigma * self.rng.standard_normal())


def main() -> None:
    """Train for the budget, then play greedy episodes with raw rewards and frozen statistics."""
    arguments = measuring.worker_arguments()
    torch.set_num_threads(1)  # more are no faster on networks this small
    settings = {name: value_of(value) for name, value in arguments["settings"].items()}
    n_envs, normalize = settings.pop("n_envs"), settings.pop("normalize", False)
    env_id, env_kwargs, seed = arguments["env_id"], arguments["env_kwargs"], arguments["seed"]
    seeds = iter(range(1000 * seed, 1000 * seed + n_envs))
    sigma = arguments.get("sigma", 0.0)
    noisy = None if sigma == 0 else lambda env: NoisyReward(env, sigma, next(seeds))
    venv: Any = make_vec_env(env_id, n_envs, seed=seed, env_kwargs=env_kwargs, wrapper_class=noisy)
    if normalize:
        venv = VecNormalize(venv, gamma=settings["gamma"])
    model = PPO("MlpPolicy", venv, seed=seed, device="cpu", **settings)
    model.learn(arguments["budget"])
    held_out: Any = make_vec_env(env_id, 10, seed=seed + 1000, env_kwargs=env_kwargs)
    if normalize:
        held_out = VecNormalize(held_out, training=False, norm_reward=False)
        held_out.obs_rms = venv.obs_rms
    returns, _ = evaluate_policy(model, held_out, arguments["episodes"], return_episode_rewards=True, warn=False)
    measuring.report({"mean": float(np.mean(returns))})


if __name__ == "__main__":
    main()

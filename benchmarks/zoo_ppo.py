"""RL Baselines3 Zoo's tuned PPO settings, by the name of our preset for the same environment.

Facts taken from its hyperparams/ppo.yml (github.com/DLR-RM/rl-baselines3-zoo); an environment it lists as v2 or v3 is
used in Gymnasium's current version. "lin_x" falls from x to 0 over the run. ``normalize``: observations and rewards by
VecNormalize, as its ``normalize: true`` means.
"""

from __future__ import annotations

from typing import Any

LARGE = {
    "log_std_init": -2, "ortho_init": False, "activation_fn": "ReLU", "net_arch": {"pi": [256, 256], "vf": [256, 256]},
}  # fmt: skip
LUNAR_LANDER = {
    "n_envs": 16, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4,
    "ent_coef": 0.01,
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "n_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20,
        "ent_coef": 0.0, "learning_rate": "lin_0.001", "clip_range": "lin_0.2",
    },
    "Acrobot-v1": {
        "normalize": True, "n_envs": 16, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4,
        "ent_coef": 0.0,
    },
    "MountainCar-v0": {
        "normalize": True, "n_envs": 16, "n_steps": 16, "gae_lambda": 0.98, "gamma": 0.99, "n_epochs": 4,
        "ent_coef": 0.0,
    },
    "MountainCarContinuous-v0": {
        "normalize": True, "n_envs": 1, "n_steps": 8, "batch_size": 256, "gae_lambda": 0.9, "gamma": 0.9999,
        "n_epochs": 10, "ent_coef": 0.00429, "learning_rate": 7.77e-5, "clip_range": 0.1, "max_grad_norm": 5,
        "vf_coef": 0.19, "use_sde": True, "policy_kwargs": {"log_std_init": -3.29, "ortho_init": False},
    },
    "Pendulum-v1": {
        "n_envs": 4, "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "ent_coef": 0.0,
        "learning_rate": 1e-3, "clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4,
    },
    "LunarLander-v3": LUNAR_LANDER,
    "LunarLander-v3-continuous": LUNAR_LANDER,
    "BipedalWalker-v3": {
        "normalize": True, "n_envs": 32, "n_steps": 2048, "batch_size": 64, "gae_lambda": 0.95, "gamma": 0.999,
        "n_epochs": 10, "ent_coef": 0.0, "learning_rate": 3e-4, "clip_range": 0.18,
    },
    "HalfCheetah-v5": {
        "normalize": True, "n_envs": 1, "n_steps": 512, "batch_size": 64, "gae_lambda": 0.92, "gamma": 0.98,
        "n_epochs": 20, "ent_coef": 0.000401762, "learning_rate": 2.0633e-05, "clip_range": 0.1, "max_grad_norm": 0.8,
        "vf_coef": 0.58096, "policy_kwargs": LARGE,
    },
    "Hopper-v5": {
        "normalize": True, "n_envs": 1, "n_steps": 512, "batch_size": 32, "gae_lambda": 0.99, "gamma": 0.999,
        "n_epochs": 5, "ent_coef": 0.00229519, "learning_rate": 9.80828e-05, "clip_range": 0.2, "max_grad_norm": 0.7,
        "vf_coef": 0.835671, "policy_kwargs": LARGE,
    },
    "Walker2d-v5": {
        "normalize": True, "n_envs": 1, "n_steps": 512, "batch_size": 32, "gae_lambda": 0.95, "gamma": 0.99,
        "n_epochs": 20, "ent_coef": 0.000585045, "learning_rate": 5.05041e-05, "clip_range": 0.1, "max_grad_norm": 1,
        "vf_coef": 0.871923,
    },
    "Swimmer-v5": {"normalize": True, "n_envs": 1, "gamma": 0.9999},
    "InvertedPendulum-v5": {
        "normalize": True, "n_envs": 1, "n_steps": 32, "batch_size": 64, "gae_lambda": 0.9, "gamma": 0.999,
        "n_epochs": 5, "ent_coef": 1.37976e-7, "learning_rate": 2.22425e-4, "clip_range": 0.4, "max_grad_norm": 0.3,
        "vf_coef": 0.19816,
    },
}  # fmt: skip

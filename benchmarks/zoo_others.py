"""RL Baselines3 Zoo's settings of A2C, ARS and TRPO, by the name of our preset for the same environment.

Facts taken from its hyperparams/a2c.yml, ars.yml and trpo.yml (github.com/DLR-RM/rl-baselines3-zoo); an environment it
lists in an older version is used in Gymnasium's current one. Where it has nothing for an environment, neither has this.
Values are written as in zoo_ppo.py; ``normalize`` may be a mapping of VecNormalize's arguments.
"""

from __future__ import annotations

from typing import Any

_OBSERVATIONS = {"norm_obs": True, "norm_reward": False}
_GSDE = {
    "normalize": True, "ent_coef": 0.0, "max_grad_norm": 0.5, "n_steps": 8, "gae_lambda": 0.9, "vf_coef": 0.4,
    "gamma": 0.99, "use_rms_prop": True, "normalize_advantage": False, "use_sde": True,
    "policy_kwargs": {"log_std_init": -2, "ortho_init": False},
}  # fmt: skip
_TRPO_GAIT = {
    "normalize": True, "n_envs": 2, "batch_size": 128, "n_steps": 1024, "gamma": 0.99, "gae_lambda": 0.95,
    "sub_sampling_factor": 1, "cg_max_steps": 25, "cg_damping": 0.1, "n_critic_updates": 20, "learning_rate": 1e-3,
}  # fmt: skip
_LINEAR = {"policy": "LinearPolicy"}

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "a2c": {
        "CartPole-v1": {"n_envs": 8, "ent_coef": 0.0},
        "Acrobot-v1": {"normalize": True, "n_envs": 16, "ent_coef": 0.0},
        "MountainCar-v0": {"normalize": True, "n_envs": 16, "ent_coef": 0.0},
        "MountainCarContinuous-v0": {
            "normalize": True, "n_envs": 4, "n_steps": 100, "ent_coef": 0.0, "use_sde": True, "sde_sample_freq": 16,
            "policy_kwargs": {"log_std_init": 0.0, "ortho_init": False},
        },
        "Pendulum-v1": {**_GSDE, "n_envs": 8, "learning_rate": "lin_7e-4"},
        "LunarLander-v3": {
            "n_envs": 8, "gamma": 0.995, "n_steps": 5, "learning_rate": "lin_0.00083", "ent_coef": 0.00001,
        },
        "LunarLander-v3-continuous": {**_GSDE, "n_envs": 4, "learning_rate": "lin_7e-4"},
        "BipedalWalker-v3": {**_GSDE, "n_envs": 16, "learning_rate": "lin_0.00096"},
    },
    "ars": {
        "CartPole-v1": {**_LINEAR, "n_envs": 2},
        "Acrobot-v1": {**_LINEAR, "n_envs": 2, "normalize": True},
        "MountainCar-v0": {**_LINEAR, "n_envs": 4, "normalize": True},
        "MountainCarContinuous-v0": {**_LINEAR, "n_envs": 4, "normalize": True, "n_delta": 16},
        "Pendulum-v1": {
            "n_envs": 1, "normalize": _OBSERVATIONS, "learning_rate": 0.018, "n_delta": 4, "n_top": 1,
            "delta_std": 0.1, "policy_kwargs": {"net_arch": [16]},
        },
        "LunarLander-v3": {**_LINEAR, "n_envs": 1, "normalize": _OBSERVATIONS},
        "LunarLander-v3-continuous": {**_LINEAR, "normalize": True},
        "BipedalWalker-v3": {
            "n_envs": 1, "learning_rate": 0.02, "delta_std": 0.0075, "n_delta": 64, "n_top": 32,
            "alive_bonus_offset": -0.1, "normalize": _OBSERVATIONS, "policy_kwargs": {"net_arch": [16]},
        },
        "Swimmer-v5": {
            **_LINEAR, "n_envs": 1, "learning_rate": 0.02, "delta_std": 0.01, "n_delta": 1, "n_top": 1,
            "alive_bonus_offset": 0,
        },
        "Hopper-v5": {
            **_LINEAR, "n_envs": 1, "learning_rate": 0.01, "delta_std": 0.025, "n_delta": 8, "n_top": 4,
            "alive_bonus_offset": -1, "normalize": _OBSERVATIONS,
        },
        "HalfCheetah-v5": {
            **_LINEAR, "n_envs": 1, "learning_rate": 0.02, "delta_std": 0.03, "n_delta": 32, "n_top": 4,
            "alive_bonus_offset": 0, "normalize": _OBSERVATIONS,
        },
        "Walker2d-v5": {
            **_LINEAR, "n_envs": 1, "learning_rate": 0.03, "delta_std": 0.025, "n_delta": 40, "n_top": 30,
            "alive_bonus_offset": -1, "normalize": _OBSERVATIONS,
        },
    },
    "trpo": {
        "CartPole-v1": {
            "n_envs": 2, "n_steps": 512, "batch_size": 512, "cg_damping": 1e-3, "gae_lambda": 0.98, "gamma": 0.99,
            "learning_rate": 1e-3, "n_critic_updates": 20,
        },
        "Acrobot-v1": {"normalize": True, "n_envs": 2, "n_steps": 1024},
        "MountainCar-v0": {"normalize": True, "n_envs": 2, "n_steps": 1024, "n_critic_updates": 20},
        "MountainCarContinuous-v0": {"normalize": True, "n_envs": 2, "use_sde": True, "sde_sample_freq": 4},
        "Pendulum-v1": {
            "n_envs": 2, "n_steps": 1024, "gamma": 0.9, "n_critic_updates": 15, "use_sde": True, "sde_sample_freq": 4,
        },
        "LunarLander-v3": {
            "n_envs": 2, "n_steps": 512, "cg_damping": 0.01, "gae_lambda": 0.98, "gamma": 0.99, "learning_rate": 1e-3,
            "n_critic_updates": 15,
        },
        "LunarLander-v3-continuous": {"normalize": True, "n_envs": 2, "n_steps": 1024, "n_critic_updates": 20},
        "BipedalWalker-v3": _TRPO_GAIT,
        "HalfCheetah-v5": {**_TRPO_GAIT, "target_kl": 0.04},
        "Hopper-v5": _TRPO_GAIT,
        "Walker2d-v5": _TRPO_GAIT,
        "Swimmer-v5": {**_TRPO_GAIT, "gamma": 0.9999},
    },
}  # fmt: skip

"""EnvPool: environments stepped in C++, behind Gymnasium's interface."""

from __future__ import annotations

import difflib
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from grouprl.envs.env_errors import cannot_make_message
from grouprl.errors import UsageError, error_text
from grouprl.extras import how_to_install


def make_envpool(env_id: str, n_envs: int, kwargs: dict[str, Any], seed: int) -> VectorEnv[Any, Any, Any]:
    """``n_envs`` environments of EnvPool.

    Raises:
        UsageError: EnvPool is not installed or cannot be imported, has no such environment, or cannot make it.
    """
    try:
        import envpool
    except ModuleNotFoundError as error:
        if error.name != "envpool":
            raise UsageError(f"EnvPool is installed and cannot be imported: {error}") from error
        raise UsageError(f"EnvPool is not installed; run: {how_to_install('envpool')}") from None
    except Exception as error:  # a library of another version that it needs, say
        raise UsageError(f"EnvPool is installed and cannot be imported: {error_text(error)}") from error
    if env_id not in envpool.list_all_envs():
        close = difflib.get_close_matches(env_id, envpool.list_all_envs(), n=3)
        raise UsageError(f"EnvPool has no environment {env_id!r}; close names: {', '.join(close) or 'none'}")
    try:
        pool = envpool.make(env_id, env_type="gymnasium", num_envs=n_envs, seed=seed, **kwargs)
    except Exception as error:
        raise UsageError(cannot_make_message(f"envpool:{env_id}", kwargs, error)) from error
    return EnvPoolVector(pool, env_id)


class EnvPoolVector(VectorEnv[Any, Any, Any]):
    """EnvPool behind Gymnasium's ``VectorEnv``: a NEXT_STEP environment that is seeded once, at construction."""

    def __init__(self, pool: Any, env_id: str) -> None:
        self.pool = pool
        self.num_envs = int(pool.config["num_envs"])
        self.single_observation_space = pool.observation_space
        self.single_action_space = pool.action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.env_id = env_id
        self.max_episode_steps = pool.spec.config.max_episode_steps

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if isinstance(seed, list):
            raise ValueError("EnvPool seeds its environments once, when it makes them")
        obs, info = self.pool.reset()
        return obs, {k: v for k, v in info.items() if k == "action_mask"}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        if np.issubdtype(actions.dtype, np.integer):
            actions = actions.astype(np.int32)
        obs, reward, terminated, truncated, info = self.pool.step(actions)
        return obs, reward, terminated, truncated, {k: v for k, v in info.items() if k == "action_mask"}

    def close_extras(self, **kwargs: Any) -> None:
        self.pool.close()

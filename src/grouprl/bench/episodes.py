"""Complete episodes of any policy, with raw rewards: for workers that run methods of other libraries.

They play as :class:`~grouprl.envs.evaluation.Evaluator` does: the same environments and starts, and each of them plays
its share, so that short episodes are not counted more often than long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from grouprl.envs.batch_checks import autoreset_mode
from grouprl.envs.evaluation import MAX_STEPS
from grouprl.envs.vector import make_vector
from grouprl.envs.workers import close_vector
from grouprl.errors import UsageError

AT_ONCE = 20
"""Environments side by side."""


def play(
    act: Callable[[Any], Any], env_id: str, env_kwargs: Mapping[str, Any] | None = None, *, episodes: int, seed: int
) -> list[float]:
    """The undiscounted returns of complete episodes.

    Args:
        act: from observations ``[n, ...]``, as the environment gives them, to actions ``[n, ...]``.
        env_id, env_kwargs: as for :class:`~grouprl.envs.grpo.GRPO`. episodes: how many. seed: of their starts.

    Raises UsageError if there is no such environment, or it resets in another mode than Gymnasium's usual one.
    """
    n = min(AT_ONCE, episodes)
    venv = make_vector(env_id, n, "auto", env_kwargs, seed=12345)
    try:
        if autoreset_mode(venv) != AutoresetMode.NEXT_STEP:
            raise UsageError(f"{env_id} does not reset at the next step; play its episodes in another way")
        left = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
        total, length, resetting = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, bool)
        returns: list[float] = []
        observations, _ = venv.reset(seed=seed)
        while left.any():
            observations, rewards, terminated, truncated, _ = venv.step(act(observations))
            total += np.where(resetting, 0.0, rewards)
            length += ~resetting
            over = ~resetting & (terminated | truncated | (length >= MAX_STEPS))
            for i in np.flatnonzero(over & (left > 0)):
                returns.append(float(total[i]))
                left[i] -= 1
            resetting = ~resetting & (terminated | truncated)
            total[over], length[over] = 0.0, 0
        return returns
    finally:
        close_vector(venv)

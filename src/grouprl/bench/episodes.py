"""Complete episodes of any policy, with raw rewards: for workers that run methods of other libraries.

They play as :class:`~grouprl.envs.evaluation.Evaluator` does: the same environments and starts, and each of them plays
its share, so that short episodes are not counted more often than long ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from grouprl.envs.arguments import whole_number
from grouprl.envs.batch_checks import autoreset_mode
from grouprl.envs.evaluation import longest
from grouprl.envs.vector import horizon, make_vector
from grouprl.envs.workers import close_vector
from grouprl.errors import UsageError

AT_ONCE = 20
"""Environments side by side."""


def say_cut(steps: int) -> None:
    """Warn of episodes that were cut after ``steps``, so that their returns are not those of complete ones."""
    warnings.warn(
        f"episodes were cut that had not ended after {steps} steps, and count with what they had returned by then: "
        "the environment has no time limit; give it one, such as env_kwargs: {max_episode_steps: 1000}",
        RuntimeWarning,
        stacklevel=2,
    )


def play(
    act: Callable[[Any], Any], env_id: str, env_kwargs: Mapping[str, Any] | None = None, *, episodes: int, seed: int,
    max_steps: int | None = None,
) -> list[float]:  # fmt: skip
    """The undiscounted returns of complete episodes; a warning says where some were cut.

    Args:
        act: from observations ``[n, ...]``, as the environment gives them, to actions ``[n, ...]``.
        env_id, env_kwargs: as for :class:`~grouprl.envs.grpo.GRPO`. episodes: how many. seed: of their starts.
        max_steps: where to cut an episode that has not ended; default: nowhere if the environment has a time limit,
            else after 100,000 steps, as :func:`~grouprl.envs.evaluation.evaluate` does.

    Raises:
        UsageError: there is no such environment, it resets in another mode than Gymnasium's usual one, or a number is
            not whole or too small.
    """
    episodes = whole_number("episodes", episodes, least=1)
    if max_steps is not None:
        max_steps = whole_number("max_steps", max_steps, least=1)
    n = min(AT_ONCE, episodes)
    venv = make_vector(env_id, n, "auto", env_kwargs, seed=12345)
    try:
        if autoreset_mode(venv) != AutoresetMode.NEXT_STEP:
            raise UsageError(f"{env_id} does not reset at the next step; play its episodes in another way")
        left = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
        total, length, resetting = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, bool)
        returns: list[float] = []
        limit, cut = max_steps or longest(horizon(venv)), False
        observations, _ = venv.reset(seed=seed)
        while left.any():
            observations, rewards, terminated, truncated, _ = venv.step(act(observations))
            total += np.where(resetting, 0.0, rewards)
            length += ~resetting
            ended = terminated | truncated
            over = ~resetting & (ended | (length >= limit))
            for i in np.flatnonzero(over & (left > 0)):
                returns.append(float(total[i]))
                left[i] -= 1
                cut |= not ended[i]
            resetting = ~resetting & ended
            total[over], length[over] = 0.0, 0
        if cut:
            say_cut(limit)
        return returns
    finally:
        close_vector(venv)

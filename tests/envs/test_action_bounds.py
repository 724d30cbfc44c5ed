"""Action spaces whose bounds are none, one-sided, far from 0 or tiny: they are learned in like any other."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from grouprl import GRPO


def reach(low: float, high: float, target: float, scale: float = 1.0, dtype: Any = np.float32) -> Any:
    """An environment of one step, whose reward is the negative distance of the action to ``target`` in ``scale``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's on rounding
        space = spaces.Box(low, high, (1,), dtype)

    class Reach(gym.Env[Any, Any]):
        observation_space = spaces.Box(-1, 1, (1,), np.float32)
        action_space: Any = space

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            return np.zeros(1, np.float32), -min(9.0, abs(float(action[0]) - target) / scale), True, False, {}

    return Reach


def trained(env: Any, steps: int = 1024) -> GRPO:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*count as none")
        agent = GRPO(env, preset=None, n_envs=8, min_steps=256, max_steps=256, warmup_steps=0, epochs=4)
    return agent.learn(steps)


def weights(agent: GRPO) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


@pytest.mark.parametrize("bound", [1e6, 1e30, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("other", [None, -2.0])
def test_bounds_that_are_none_are_learned_in_as_none_are(bound: float, other: float | None) -> None:
    wide = trained(reach(-bound if other is None else other, bound, 0.7))
    none = trained(reach(-np.inf if other is None else other, np.inf, 0.7))
    assert torch.equal(weights(wide), weights(none))


@pytest.mark.parametrize(
    ("low", "high", "target", "scale", "dtype"),
    [
        (0.0, np.inf, 0.7, 1.0, np.float32),
        (100.0, np.inf, 101.5, 1.0, np.float32),
        (-np.inf, -50.0, -51.5, 1.0, np.float32),
        (-1e-8, 1e-8, 0.5e-8, 1e-8, np.float64),
        (1e6, 1e6 + 2, 1e6 + 1.5, 1.0, np.float64),
        (-np.inf, np.inf, 1.0, 1.0, np.float64),
        (-np.inf, np.inf, 1.0, 1.0, np.float16),
    ],
)
def test_every_kind_of_bound_is_learned_in(low: float, high: float, target: float, scale: float, dtype: Any) -> None:
    agent = trained(reach(low, high, target, scale, dtype), 8000)
    action, _ = agent.predict(np.zeros(1, np.float32), deterministic=True)
    assert abs(float(action[0]) - target) < 0.25 * scale


def test_a_space_of_a_single_value_gives_it() -> None:
    with pytest.warns(RuntimeWarning, match="all rewards were equal"):
        agent = trained(reach(3.0, 3.0, 3.0))
    assert agent.predict(np.zeros(1, np.float32))[0].tolist() == [3.0]

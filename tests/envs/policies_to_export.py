"""Small trained agents of many spaces, whose policies are to be used outside of grouprl."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from grouprl import GRPO

QUICK: dict[str, Any] = {"preset": None, "n_envs": 4, "min_steps": 64, "max_steps": 64, "epochs": 1, "warmup_steps": 64}

BOX = spaces.Box(-5, 5, (3,), np.float64)
NESTED = spaces.Dict(
    {
        "picture": spaces.Box(0, 255, (20, 24, 3), np.uint8),
        "frames": spaces.Box(0, 255, (4, 16, 16), np.uint8),
        "film": spaces.Box(0, 255, (2, 16, 18, 3), np.uint8),
        "film channels first": spaces.Box(0, 255, (2, 3, 16, 18), np.uint8),
        "grey": spaces.Box(0, 255, (17, 16), np.uint8),
        "place": spaces.Discrete(5, start=2),
        "pair": spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Box(-9, 9, (2, 2), np.float32)]),
        "lamps": spaces.MultiBinary(3),
    }
)
MASKED = spaces.Dict({"x": spaces.Box(-1, 1, (2,), np.float32), "action_mask": spaces.MultiBinary(4)})

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "box": (BOX, spaces.Discrete(3, start=1), {}),
    "relu": (BOX, spaces.Discrete(3), {"activation": "relu", "normalize_observations": False}),
    "gaussian": (BOX, spaces.Box(np.float32([-1, 0, -np.inf]), np.float32([2, np.inf, np.inf])), {}),
    "double": (BOX, spaces.Box(-1, 2, (2, 1), np.float64), {}),
    "discrete": (spaces.Discrete(6, start=-1), spaces.MultiDiscrete([[2, 3]], start=[[0, 4]]), {}),
    "nested": (NESTED, spaces.MultiBinary((1, 3)), {}),
    "image": (spaces.Box(0, 255, (20, 24, 3), np.uint8), spaces.Discrete(2), {}),
    "masked": (MASKED, spaces.Discrete(4), {}),
    "masked in info": (BOX, spaces.Discrete(4), {}),
    "masked components": (BOX, spaces.MultiDiscrete([2, 3]), {}),
    "own": (
        BOX,
        spaces.Discrete(2),
        {"network": lambda i, o: nn.Sequential(nn.Linear(i, 4), nn.SiLU(), nn.Linear(4, o))},
    ),
    "own double": (BOX, spaces.Discrete(2), {"network": lambda i, o: nn.Linear(i, o).double()}),
}


def agent_for(name: str, steps: int = 256) -> GRPO:
    """The agent of a case, after some training."""
    seen, acted, settings = CASES[name]

    class Random(gym.Env[Any, Any]):
        observation_space: Any = seen
        action_space: Any = acted

        def look(self) -> Any:
            made = self.observation_space.sample()
            if name == "masked":
                made["action_mask"][0] = 1
            return made

        def info(self) -> dict[str, Any]:
            if "masked" not in name or name == "masked":
                return {}
            size = int(np.sum(getattr(self.action_space, "nvec", getattr(self.action_space, "n", 0))))
            mask = self.np_random.random(size) < 0.5
            mask[[0, 2]] = True  # the first of each component
            return {"action_mask": mask}

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            if seed is not None:  # else what follows the seed of the first reset would be drawn anew
                self.observation_space.seed(seed)
            self.time = 0
            return self.look(), self.info()

        def step(self, action: Any) -> Any:
            self.time += 1
            return self.look(), float(self.np_random.normal()), self.time >= 10, False, self.info()

    agent = GRPO(Random, learning_rate=1e-2, **QUICK | settings)
    if steps:
        agent.learn(steps)
    with torch.no_grad():
        for p in agent.policy.parameters():
            p.mul_(1.5)  # so that no two actions are all but equally likely
    return agent

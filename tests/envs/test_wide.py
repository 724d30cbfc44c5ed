"""Wide observations and large images: time and memory grow with their width, not with its square."""

from __future__ import annotations

import tracemalloc
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from grouprl import GRPO
from grouprl.envs import estimate
from grouprl.envs.config import make_config
from grouprl.envs.estimate import SKETCHED, Baseline, summary
from grouprl.objective import RandomFeatures

QUICK: dict[str, Any] = {
    "preset": None,
    "n_envs": 4,
    "min_steps": 128,
    "max_steps": 128,
    "epochs": 1,
    "warmup_steps": 0,
}

SPACES = {
    "discrete": spaces.Discrete(8000),
    "multi": spaces.MultiDiscrete([3000, 3000, 3000]),
    "box": spaces.Box(-1, 1, (8000,), np.float32),
    "frames": spaces.Box(0, 1, (4, 52, 52), np.float32),
    "nested": spaces.Dict(a=spaces.Discrete(5000), b=spaces.Box(0, 255, (20, 20, 3), np.uint8)),
}


def environment(space: spaces.Space[Any]) -> Any:
    class Wide(gym.Env[Any, Any]):
        observation_space = space
        action_space: Any = spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            space.seed(seed)
            self.time = 0
            return space.sample(), {}

        def step(self, action: Any) -> Any:
            self.time += 1
            return space.sample(), float(action), self.time >= 10, False, {}

    return Wide


@pytest.mark.parametrize("name", SPACES)
def test_the_regression_of_a_wide_observation_is_narrow(name: str) -> None:
    agent = GRPO(environment(SPACES[name]), **QUICK).learn(256)
    baseline = agent.loop.baseline
    assert baseline is not None
    assert baseline.weights is not None
    assert len(baseline.weights) == agent.config.baseline_features + 2 * SKETCHED + 3
    assert agent.predict(SPACES[name].sample())[0] in (0, 1)


def test_memory_grows_with_the_width() -> None:
    def peak(width: int) -> int:
        agent = GRPO(environment(spaces.Box(-1, 1, (width,), np.float32)), **QUICK)
        tracemalloc.start()
        agent.learn(128)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(16_000) < 10 * peak(2_000)


def test_parts_of_a_batch_are_summed_up_to_what_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "flat": torch.randn(50, 7, generator=generator),
        "image:a": torch.randint(0, 256, (50, 3, 20, 24), generator=generator, dtype=torch.uint8),
    }
    whole = summary(inputs)
    narrow = Baseline(RandomFeatures.create(whole.shape[1], 8, 0), 10)
    wide = Baseline.create(9000, make_config({}), 10)
    flat = {"flat": torch.randn(50, 9000, generator=generator)}
    expected = wide.seen(flat)
    monkeypatch.setattr(estimate, "CHUNK_NUMBERS", 30_000)
    assert torch.equal(narrow.seen(inputs), whole)
    assert torch.equal(wide.seen(flat), expected)
    assert narrow.seen({"flat": flat["flat"]}) is flat["flat"]


def test_large_images_are_differentiated_a_few_at_a_time() -> None:
    screen = GRPO(
        environment(spaces.Box(0, 255, (210, 160, 3), np.uint8)), **QUICK | {"min_steps": 32, "max_steps": 32}
    )
    assert 100 < screen.loop.learner.settings.micro_batch < 200
    small = GRPO(environment(spaces.Box(0, 255, (84, 84, 4), np.uint8)), **QUICK)
    assert small.loop.learner.settings.micro_batch == 512
    screen.learn(32)

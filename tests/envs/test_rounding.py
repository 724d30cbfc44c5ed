"""Numbers whose changes are lost in float32 are warned of at warm-up; others are not."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from grouprl import GRPO

QUICK: dict[str, Any] = {
    "preset": None, "n_envs": 4, "collect": "segments", "n_steps": 16, "epochs": 1, "warmup_steps": 1024,
}  # fmt: skip


class Clock(gym.Env[Any, Any]):
    """Shows `offset` plus a time that goes on by `tick` a step."""

    action_space = spaces.Discrete(2)

    def __init__(self, offset: float, tick: float, dtype: Any = np.float64, *, named: bool = False) -> None:
        self.offset, self.tick, self.dtype, self.named = offset, tick, dtype, named
        clock = spaces.Box(-1e18, 1e18, (2,), dtype) if dtype != np.int64 else spaces.Box(0, 2**62, (2,), dtype)
        self.observation_space = spaces.Dict({"clock": clock, "kind": spaces.Discrete(3)}) if named else clock

    def _seen(self) -> Any:
        clock = np.array([self.t % 3, self.offset + self.tick * self.t]).astype(self.dtype)
        return {"clock": clock, "kind": np.int64(self.t % 3)} if self.named else clock

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self._seen(), float(action), False, self.t == 200, {}


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float32])
def test_a_clock_far_from_its_origin_is_warned_of_once(dtype: Any) -> None:
    agent = GRPO(lambda: Clock(1.7e9, 1.0, dtype), **QUICK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent.learn(1200).learn(64)
    said = [str(one.message) for one in caught if "float32" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith("component 1 of the observation is up to 1.7e+09 and changes by about ")
    assert "differs by 1.3e+02: most of its changes are lost. Subtract the offset in the environment" in said[0]


def test_the_number_is_named_by_its_key() -> None:
    with pytest.warns(UserWarning, match=r"component 1 of 'clock' of the observation is up to 1\.7e\+09"):
        GRPO(lambda: Clock(1.7e9, 1.0, named=True), **QUICK).learn(64)


@pytest.mark.parametrize(
    "clock",
    [(0.0, 1.0), (1e6, 1.0), (2.0**24 - 500, 1.0, np.float32), (1.7e9, 1e5), (1e12, 0.0), (1.0, 1e-9), (0.0, 1e9)],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_numbers_that_float32_tells_apart_are_not_warned_of(clock: Any) -> None:
    GRPO(lambda: Clock(*clock), **QUICK).learn(64)

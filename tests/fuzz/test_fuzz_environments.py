"""An environment that returns anything: training says what was wrong with it, or goes on where it could be meant."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from odd import Hostile, result_or_clear_error, values

from grouprl import GRPO

GOOD = np.zeros(2, np.float32)
usual = st.sampled_from([0.0, 1.0, np.float32(1), np.array(1.0), True, False, np.bool_(True), GOOD, {}])
anything = usual | values
SETTINGS: dict[str, Any] = {
    "preset": None, "n_envs": 2, "collect": "segments", "n_steps": 8, "epochs": 1, "warmup_steps": 4,
    "hidden_sizes": [4], "threads": 1, "vectorization": "sync",
}  # fmt: skip


class Odd(gym.Env[Any, Any]):
    """Does what `does` says: at the step number, or at the reset number, that it is given for."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, resets: dict[int, Any], steps: dict[int, Any], length: int) -> None:
        self.resets, self.steps, self.length = resets, steps, length
        self.n_resets = self.n_steps = self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.n_resets, self.t = self.n_resets + 1, 0
        return _done(self.resets.get(self.n_resets, (GOOD, {})))

    def step(self, action: Any) -> Any:
        self.n_steps, self.t = self.n_steps + 1, self.t + 1
        return _done(self.steps.get(self.n_steps, (GOOD, 1.0 * action, self.t >= self.length, False, {})))


def _done(what: Any) -> Any:
    if isinstance(what, BaseException):
        raise what
    return what


class OddError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even this")


errors = st.sampled_from([
    ValueError("x" * 5000), RuntimeError(), KeyError("key"), OddError(), StopIteration(), AssertionError(),
    RecursionError("too deep"), MemoryError(), OSError(5, "broken"), ValueError(Hostile()),
])  # fmt: skip
infos = st.just({}) | st.dictionaries(st.sampled_from(["a", "action_mask", "final_obs", "_a"]), anything, max_size=2)
resets = st.one_of(st.tuples(anything, infos), st.tuples(st.just(GOOD), anything), anything, errors)
steps = st.one_of(
    st.tuples(st.just(GOOD), anything, st.booleans(), st.booleans(), infos),
    st.tuples(st.just(GOOD), st.just(1.0), anything, anything, infos),
    st.tuples(anything, st.just(1.0), st.booleans(), st.booleans(), infos),
    st.tuples(anything, anything, anything, anything, anything),
    st.lists(anything, max_size=6),
    anything,
    errors,
)


def learned(make: Any, **settings: Any) -> None:
    agent = GRPO(make, **{**SETTINGS, **settings})
    try:
        agent.learn(48)
        assert all(np.isfinite(p.detach().numpy()).all() for p in agent.policy.parameters())
        assert np.isfinite(agent.recent_returns).all()
    finally:
        agent.close()


@given(
    st.dictionaries(st.integers(1, 4), resets, max_size=2),
    st.dictionaries(st.integers(1, 12), steps, max_size=2),
    st.integers(1, 6),
    st.sampled_from(
        [{}, {"collect": "episodes", "min_steps": 8}, {"collect": "auto", "min_steps": 8, "max_steps": 16}]
    ),
)
def test_what_an_environment_returns(
    resets: dict[int, Any], steps: dict[int, Any], length: int, settings: dict[str, Any]
) -> None:
    result_or_clear_error(lambda: learned(lambda: Odd(resets, steps, length), **settings))


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.sampled_from([0.0, 1.0, -1e30, 1e30, 1e-30])), min_size=1),
    st.sampled_from(["baseline", "outcome", "leave_one_out", "timestep", "batch_returns", "reinforce_pp", "maxrl"]),
    st.sampled_from(["auto", "episodes", "segments"]),
)
def test_lengths_and_ends_of_episodes(plan: list[tuple[int, bool, float]], advantage: str, collect: str) -> None:
    class Planned(Odd):
        def reset(self, **given: Any) -> Any:
            self.plan = plan[self.n_resets % len(plan)]
            return super().reset(**given)

        def step(self, action: Any) -> Any:
            self.t += 1
            length, truncated, reward = self.plan
            over = self.t >= length
            return GOOD, reward, over and not truncated, over and truncated, {}

    result_or_clear_error(
        lambda: learned(lambda: Planned({}, {}, 1), advantage=advantage, collect=collect, min_steps=16, max_steps=32)
    )


@given(anything | errors)
def test_what_is_given_as_an_environment(env: Any) -> None:
    result_or_clear_error(lambda: learned(env))
    result_or_clear_error(lambda: learned(lambda: _done(env)))

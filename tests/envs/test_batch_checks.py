"""Vector environments of somebody's own, whose results must fit the number of environments they say they hold."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from test_environment_of_an_agent import Sign, Turns

from grouprl import GRPO, TrainingError, UsageError, evaluate

QUICK: dict[str, Any] = {"preset": None, "collect": "segments", "n_steps": 16, "epochs": 1, "warmup_steps": 0}


class Own(VectorEnv[Any, Any, Any]):
    """Three environments whose episodes end after five steps, reset in the step after; each test spoils one thing."""

    metadata: Any = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    num_envs: Any = 3
    single_observation_space: Any = spaces.Box(-1, 1, (2,), np.float32)
    single_action_space: Any = spaces.Discrete(2)

    def __init__(self, reset: Any = None, **what: Any) -> None:
        self.first, self.what, self.steps = reset, what, 0

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.steps = 0
        return (np.zeros((3, 2), np.float32) if self.first is None else self.first), {}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        done = np.full(3, self.steps % 6 == 5)
        usual = {"obs": np.zeros((3, 2), np.float32), "reward": np.ones(3), "terminated": done}
        given = usual | {"truncated": np.zeros(3, bool), "info": {}} | self.what
        return tuple(given[key] for key in ("obs", "reward", "terminated", "truncated", "info"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"reward": np.ones(2)}, r"rewards .*of shape \(2,\); it must return an array \(3,\)"),
        ({"reward": np.ones((3, 1))}, r"of shape \(3, 1\)"),
        ({"reward": 1.0}, r"of shape \(\)"),
        ({"reward": ["1", "1", "1"]}, "one number for each environment"),
        ({"terminated": np.array([0.0, np.nan, 0.0])}, "terminated .* must hold True or False"),
        ({"truncated": [None, None, None]}, "truncated"),
        ({"truncated": False}, r"truncated .*\(3,\)"),
        ({"info": None}, "info None .* must be a dict"),
        ({"info": {"final_obs": np.zeros((3, 2))}}, r"metadata says .*NEXT_STEP; correct metadata"),
        ({"info": {"final_observation": np.zeros((3, 2))}}, "correct metadata"),
        ({"obs": np.zeros((2, 2), np.float32)}, "num_envs=3 and returned 2 observations"),
        ({"obs": np.zeros((3, 3), np.float32)}, r"has shapes \(3, 3\)"),
        ({"reset": np.zeros(2, np.float32)}, "1 observation without a batch axis"),
    ],
)
def test_what_does_not_fit_is_refused(what: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        GRPO(Own(**what), **QUICK).learn(48)


def test_lists_and_tensors_are_taken() -> None:
    what = {"reward": [1.0, 1, 1], "terminated": torch.tensor([True, False, True]), "truncated": [0, 0, 1]}
    assert GRPO(Own(**what), **QUICK).learn(48).num_timesteps >= 48
    assert evaluate(GRPO(Own(), **QUICK), episodes=3).returns == [5.0] * 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_envs", None, "num_envs=None"),
        ("num_envs", 0, "num_envs=0"),
        ("single_action_space", None, "single_action_space=None"),
        ("closed", True, "is closed"),
        ("metadata", {"autoreset_mode": "sometimes"}, "'sometimes'; allowed are"),
    ],
)
def test_what_it_must_have_is_looked_at_first(name: str, value: Any, message: str) -> None:
    env = Own()
    setattr(env, name, value)
    with pytest.raises(UsageError, match=message):
        GRPO(env, **QUICK)


class Text(Sign):
    def step(self, action: Any) -> Any:
        return *super().step(action)[:2], "no", False, {}


@pytest.mark.parametrize("wrap", [lambda venv: venv, gym.wrappers.vector.RecordEpisodeStatistics])
def test_the_environments_of_gymnasiums_own_are_looked_at_one_by_one(wrap: Any) -> None:
    venv = gym.vector.SyncVectorEnv([Sign, Text])
    own = list(venv.envs)
    with pytest.raises(TrainingError, match="environment 1: terminated must be True or False; it returned 'no'"):
        GRPO(wrap(venv), **QUICK).learn(48)
    assert venv.envs == own


@pytest.mark.parametrize("kind", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_masks_that_would_not_be_asked_for_are_refused(kind: Any) -> None:
    venv = kind([Turns, Turns])
    with pytest.raises(UsageError, match=r"action_masks\(\), which is not asked"):
        GRPO(venv, **QUICK)
    venv.close()


def test_a_mode_that_is_not_said_is_warned_of() -> None:
    env = Own()
    env.metadata = {}
    with pytest.warns(UserWarning, match="NEXT_STEP is assumed"):
        GRPO(env, **QUICK)


def test_a_reset_in_the_same_step_needs_the_last_observations() -> None:
    env = Own()
    env.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    with pytest.raises(TrainingError, match=r"gives no info\['final_obs'\]"):
        GRPO(env, **QUICK).learn(48)
    GRPO(gym.make_vec("CartPole-v1", num_envs=2), **QUICK).learn(48)

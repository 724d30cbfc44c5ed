"""Vector environments of somebody's own, whose results must fit the number of environments they say they hold."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
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


class Turned(Sign):
    """Returns ``later`` for ``terminated`` long after the first looks."""

    def __init__(self, later: Any) -> None:
        super().__init__()
        self.later, self.steps = later, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, self.later if self.steps == 25 else False, truncated or self.t >= 10, info


@pytest.mark.parametrize("later", ["False", None, float("nan"), 0.5, np.array([True])])
def test_environments_in_a_sync_vector_of_the_users_are_checked_at_every_step(later: Any) -> None:
    venv = SyncVectorEnv([Sign, lambda: Turned(later)])
    own = list(venv.envs)
    with pytest.raises(TrainingError, match="environment 1: terminated must be True or False"):
        GRPO(venv, **QUICK).learn(500)
    assert venv.envs == own  # they are the user's, and as they were


def test_wrappers_of_a_vector_see_the_infos_of_its_environments() -> None:
    class Lives(Sign):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:4], {"lives": 3}

    class Reads(VectorWrapper):
        seen: Any = []  # noqa: RUF012

        def step(self, actions: Any) -> Any:
            result = self.env.step(actions)
            self.seen.extend(result[4].get("lives", [3]))  # none where all only reset
            return result

    GRPO(Reads(SyncVectorEnv([Lives, Lives])), **QUICK).learn(64)
    assert set(Reads.seen) == {3}


def test_nobody_reads_infos_of_a_plain_vector_so_they_may_hold_anything() -> None:
    class Winner(Sign):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:4], {"winner": None if self.t % 3 else 1}

    GRPO(SyncVectorEnv([Winner, Winner]), **QUICK).learn(64)


def test_the_last_observation_is_seen_where_one_array_serves_all_of_an_environments() -> None:
    class OneArray(Sign):
        def __init__(self) -> None:
            super().__init__()
            self.array = np.zeros(2, np.float32)

        def look(self) -> Any:
            self.array[:] = super().look()
            return self.array

    def trained(kind: Any) -> Any:
        venv = SyncVectorEnv([kind, kind], autoreset_mode=AutoresetMode.SAME_STEP)
        return GRPO(venv, seed=1, **QUICK).learn(200).policy.state_dict()

    for name, tensor in trained(Sign).items():
        assert torch.equal(tensor, trained(OneArray)[name])

"""The time limit of an environment is found in whatever shape the environments come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from test_environment_of_an_agent import Sign

from grouprl.envs.vector import horizon, make_vector
from grouprl.envs.workers import close_vector


def limited() -> gym.Env[Any, Any]:
    return gym.wrappers.TransformReward(TimeLimit(Sign(), 7), float)


def registered() -> gym.Env[Any, Any]:
    return gym.make("MountainCar-v0", max_episode_steps=7)


class Hiding(VectorEnv[Any, Any, Any]):
    """A wrapper of the user's own, which names what it wraps by `unwrapped` alone."""

    def __init__(self, hidden: VectorEnv[Any, Any, Any]) -> None:
        self.hidden, self.num_envs = hidden, hidden.num_envs
        self.single_observation_space, self.single_action_space = (
            hidden.single_observation_space,
            hidden.single_action_space,
        )

    @property
    def unwrapped(self) -> VectorEnv[Any, Any, Any]:
        return self.hidden.unwrapped

    def close(self, **kwargs: Any) -> None:
        self.hidden.close()


class Naming(VectorWrapper[Any, Any, Any, Any, Any]):
    """A wrapper that says itself when it ends episodes."""

    max_episode_steps = 7


SHAPES: dict[str, Callable[[], VectorEnv[Any, Any, Any]]] = {
    "a callable, side by side": lambda: make_vector(limited, 2),
    "a callable, in processes": lambda: make_vector(limited, 2, "async"),
    "an id, side by side": lambda: make_vector("MountainCar-v0", 2, "sync", {"max_episode_steps": 7}),
    "an id, in processes": lambda: make_vector("MountainCar-v0", 2, "async", {"max_episode_steps": 7}),
    "an environment": lambda: make_vector(limited(), 1),
    "SyncVectorEnv": lambda: SyncVectorEnv([limited] * 2),
    "AsyncVectorEnv": lambda: AsyncVectorEnv([limited] * 2),
    "AsyncVectorEnv of registered ones": lambda: AsyncVectorEnv([registered] * 2),
    "a wrapped SyncVectorEnv": lambda: RecordEpisodeStatistics(SyncVectorEnv([limited] * 2)),
    "an AsyncVectorEnv wrapped twice": lambda: VectorWrapper(RecordEpisodeStatistics(AsyncVectorEnv([limited] * 2))),
    "make_vec": lambda: gym.make_vec("CartPole-v1", 2, "vector_entry_point", max_episode_steps=7),
    "make_vec, wrapped": lambda: RecordEpisodeStatistics(
        gym.make_vec("CartPole-v1", 2, "vector_entry_point", max_episode_steps=7)
    ),
    "a wrapper of another kind": lambda: Hiding(SyncVectorEnv([limited] * 2)),
    "a wrapper with a limit of its own": lambda: Naming(SyncVectorEnv([Sign] * 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_time_limit_is_found(shape: str) -> None:
    venv = SHAPES[shape]()
    try:
        assert horizon(venv) == 7
    finally:
        close_vector(venv)


@pytest.mark.parametrize("make", [SyncVectorEnv, AsyncVectorEnv])
def test_environments_without_a_limit_have_none_and_go_on(make: Any) -> None:
    venv = make([Sign] * 2)
    assert horizon(venv) is None
    venv.reset(seed=0)
    venv.step(venv.action_space.sample())
    close_vector(venv)


def test_workers_that_have_ended_are_not_asked() -> None:
    venv = AsyncVectorEnv([limited] * 2)
    venv.processes[0].kill()
    venv.processes[0].join()
    assert horizon(venv) is None
    close_vector(venv)
    assert horizon(venv) is None

"""An id means the environment that gymnasium.make gives, whatever vectorised version it brings along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from test_batch_checks import Own
from test_environment_of_an_agent import Sign

from grouprl import GRPO, UsageError, evaluate

QUICK: dict[str, Any] = {"preset": None, "n_envs": 3, "collect": "segments", "n_steps": 16, "warmup_steps": 0}


class Clipping(Own):
    """The same spaces, other rewards."""

    def __init__(self, num_envs: int, max_episode_steps: int | None = None) -> None:
        super().__init__(reward=np.full(3, 9.0))


class Stacking(Clipping):
    single_observation_space = spaces.Box(-1, 1, (4, 2), np.float32)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register("Clipping-v0", entry_point=Sign, vector_entry_point=Clipping)
    gym.register("Stacking-v0", entry_point=Sign, vector_entry_point=Stacking)
    yield
    del gym.registry["Clipping-v0"], gym.registry["Stacking-v0"]


@pytest.mark.parametrize("name", ["Clipping-v0", "Stacking-v0"])
def test_it_is_not_taken_by_itself(name: str) -> None:
    agent = GRPO(name, **QUICK).learn(48)
    assert agent.observation_space == Sign.observation_space
    assert max(evaluate(agent, episodes=3).returns) <= 10


def test_one_with_other_spaces_is_refused_and_one_with_the_same_taken_when_asked_for() -> None:
    with pytest.raises(UsageError, match=r"another environment than gymnasium.make gives: it has the spaces"):
        GRPO("Stacking-v0", vectorization="vector_entry_point", **QUICK)
    agent = GRPO("Clipping-v0", vectorization="vector_entry_point", **QUICK).learn(48)
    assert isinstance(agent.get_env(), Clipping)
    assert max(evaluate(agent, episodes=3).returns) <= 10  # raw rewards


def test_cart_pole_is_stepped_as_one_and_made_singly_for_arguments_that_only_one_takes() -> None:
    quick = QUICK | {"n_envs": 2}
    assert not isinstance(GRPO("CartPole-v1", **quick).get_env(), gym.vector.SyncVectorEnv)
    agent = GRPO("CartPole-v1", env_kwargs={"disable_env_checker": False}, **quick)
    assert isinstance(agent.get_env(), gym.vector.SyncVectorEnv)

"""What a user does wrong, or an environment does: one clear message, and nothing in the way of another try."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from grouprl import GRPO, TrainingError, UsageError, evaluate
from grouprl.envs import training

QUICK: dict[str, Any] = {
    "preset": None, "n_envs": 2, "collect": "segments", "n_steps": 16, "epochs": 1, "warmup_steps": 0,
}  # fmt: skip


class Plain(gym.Env[Any, Any]):
    """Never ends; each test spoils one thing."""

    observation_space: Any = spaces.Box(-1, 1, (2,), np.float32)
    action_space: Any = spaces.Discrete(2)
    reward: Any = 1.0
    pause = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        time.sleep(self.pause)
        return np.zeros(2, np.float32), self.reward, False, False, {}


class Strange(gym.Space[Any]):
    """A space of someone else's, which does not say whether it flattens."""


class ArrayReward(Plain):
    reward = np.array([1.0, 2.0])


class OldStep(Plain):
    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 1.0, False, {}


class Slow(Plain):
    pause = 0.02


@pytest.fixture
def registered() -> Iterator[Any]:
    names: list[str] = []

    def register(name: str, **how: Any) -> str:
        gym.register(name, **how)
        names.append(name)
        return name

    yield register
    for name in names:
        del gym.registry[name]


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    agent = GRPO(Slow, **QUICK | {"vectorization": "async"})
    venv: Any = agent.get_env()
    victim = venv.processes[-1].pid  # the last one: its answer is waited for after all others
    threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
    with pytest.raises(TrainingError, match="worker process died"):
        agent.learn(100_000)
    agent.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: None, "must be a gymnasium.Env"),
        (lambda: open("/nowhere/at/all"), "FileNotFoundError"),  # noqa: SIM115
    ],
)
def test_a_constructor_that_fails_is_named(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GRPO(make, **QUICK)


def test_a_missing_constructor_argument_is_named_and_how_to_give_it(registered: Any) -> None:
    class Needs(Plain):
        def __init__(self, size: int) -> None:
            self.size = size

    name = registered("Needs-v0", entry_point=lambda **kwargs: Needs(**kwargs))
    with pytest.raises(UsageError, match=r"'size'.*env_kwargs"):
        GRPO(name, **QUICK)
    assert GRPO(name, env_kwargs={"size": 3}, **QUICK).env_kwargs == {"size": 3}


def test_a_space_that_does_not_say_whether_it_flattens_is_refused() -> None:
    class Mission(Plain):
        observation_space = spaces.Dict({"image": spaces.Box(0, 255, (7, 7, 3), np.uint8), "mission": Strange()})

    with pytest.raises(UsageError, match=r"leaf 'mission'.*FilterObservation"):
        GRPO(Mission, **QUICK)


@pytest.mark.parametrize(
    ("make", "message"), [(ArrayReward, "one number"), (OldStep, r"step must return \(observation, reward, terminated")]
)
def test_an_environment_that_breaks_the_interface_is_told_which_rule(make: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        GRPO(make, **QUICK).learn(100)


class OwnVector(VectorEnv[Any, Any, Any]):
    """A vector entry point that knows no time limit and takes no such argument."""

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Plain.observation_space, Plain.action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.steps = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.steps = 0
        return np.zeros((self.num_envs, 2), np.float32), {}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        done = np.full(self.num_envs, self.steps % 6 == 5)
        zeros = np.zeros((self.num_envs, 2), np.float32)
        return zeros, np.ones(self.num_envs), done, np.zeros(self.num_envs, bool), {}


class FiveSteps(Plain):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.steps = 0
        return super().reset()

    def step(self, action: Any) -> Any:
        self.steps += 1
        seen, reward, _, truncated, info = super().step(action)
        return seen, reward, self.steps == 5, truncated, info


def test_a_vector_entry_point_without_a_time_limit_is_evaluated(registered: Any) -> None:
    name = registered("OwnVector-v0", entry_point=FiveSteps, vector_entry_point=OwnVector)
    agent = GRPO(name, vectorization="vector_entry_point", **QUICK).learn(64)
    assert isinstance(agent.get_env(), OwnVector)
    assert evaluate(agent, episodes=4).returns == [5.0] * 4


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing_in_the_way(
    tmp_path: Path, registered: Any
) -> None:
    name = registered("ArrayReward-v0", entry_point=ArrayReward)
    with pytest.raises(TrainingError, match="one number"):
        training.train(name, tmp_path / "run", settings={k: v for k, v in QUICK.items() if k != "preset"}, steps=100)
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_end_can_be_evaluated_from_its_checkpoint(tmp_path: Path) -> None:
    run = {"eval_every": 1000, "eval_episodes": 1, "final_episodes": 1, "checkpoint_every": 300, "video": False}
    settings = {k: v for k, v in QUICK.items() if k != "preset"}
    training.train("CartPole-v1", tmp_path / "run", preset=None, steps=1000, settings=settings, run=run)
    (tmp_path / "run" / "model.safetensors").unlink()
    assert GRPO.load(tmp_path / "run").num_timesteps >= 1000


def test_an_environment_that_is_refused_is_closed() -> None:
    closed: list[bool] = []

    class Other(Plain):
        observation_space = spaces.Box(-1, 1, (3,), np.float32)

        def close(self) -> None:
            closed.append(True)

    agent = GRPO(Plain, **QUICK)
    with pytest.raises(UsageError, match="observation space"):
        agent.set_env(Other)
    assert closed == [True, True]


def test_settings_that_are_arguments_of_python_are_no_settings(tmp_path: Path) -> None:
    for name in ("env", "network", "preset"):
        with pytest.raises(UsageError, match=f"unknown setting '{name}'"):
            training.train("CartPole-v1", tmp_path / "run", settings={name: 3})
    with pytest.raises(UsageError, match="network='x'"):
        GRPO("CartPole-v1", network="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_must_be_finite(value: float) -> None:
    for name in ("log_std_init", "baseline_ridge", "learning_rate", "gamma"):
        with pytest.raises(UsageError, match="finite"):
            GRPO("CartPole-v1", **{name: value})

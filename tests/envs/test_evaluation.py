"""Evaluation counts whole episodes, and says where it could not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from grouprl import GRPO, UsageError, evaluate
from grouprl.envs import evaluation
from grouprl.envs.callbacks import Evaluations, Run
from grouprl.runs import read_metrics


class Long(gym.Env[Any, Any]):
    """Ends by itself after as many steps as ``lengths`` says, in turn; reward 1 a step. 0 is never."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)
    lengths: tuple[int, ...] = (8000,)

    def __init__(self) -> None:
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode += 1
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        over = self.time == self.lengths[self.episode % len(self.lengths)]
        return np.zeros(1, np.float32), 1.0, over, False, {}


class Some(Long):
    lengths = (3, 0, 5)


class Endless(Long):
    lengths = (0,)


@pytest.fixture(scope="module")
def agent() -> GRPO:
    return GRPO(Long, preset=None, n_envs=2, min_steps=64, warmup_steps=0)


def venv(env: Any, mode: AutoresetMode, n: int = 2) -> SyncVectorEnv:
    return SyncVectorEnv([env] * n, autoreset_mode=mode)


def test_an_episode_that_ends_by_itself_is_not_cut(agent: GRPO) -> None:
    for env in (Long, Long()):
        result = evaluate(agent, env, episodes=2)
        assert result.lengths == [8000, 8000]
        assert result.cut == 0


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_what_remains_of_a_cut_episode_is_no_episode(agent: GRPO, mode: AutoresetMode) -> None:
    for env in (Some, Some(), venv(Some, mode), venv(Some, mode, 1)):
        result = evaluate(agent, env, episodes=6, max_steps=10)
        n = getattr(env, "num_envs", 6 if isinstance(env, type) else 1)
        expected = {6: [3] * 6, 2: [3, 3, 5, 5, 10, 10], 1: [3, 3, 5, 5, 10, 10]}[n]
        assert sorted(result.lengths) == expected
        assert result.returns == [float(n) for n in result.lengths]
        assert result.summary()["cut"] == result.lengths.count(10)


def test_an_environment_that_never_ends_is_cut_everywhere(agent: GRPO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_STEPS", 20)
    result = evaluate(agent, Endless, episodes=40)
    assert (result.lengths, result.cut) == ([20] * 40, 40)


def test_a_time_limit_ends_episodes_and_is_no_cut(agent: GRPO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_STEPS", 20)
    for limited in (lambda: TimeLimit(Endless(), 7), lambda: TimeLimit(TimeLimit(Endless(), 7), 9)):
        result = evaluate(agent, limited, episodes=3)
        assert (result.lengths, result.cut) == ([7] * 3, 0)


def test_the_steps_of_an_episode_can_be_bounded_but_not_by_nothing(agent: GRPO) -> None:
    with pytest.raises(UsageError, match="max_steps=0"):
        evaluate(agent, episodes=1, max_steps=0)


@pytest.mark.parametrize("episodes", [0, 2.5, "3", None, True, float("nan"), float("inf")])
def test_a_number_of_episodes_that_is_none_is_refused(agent: GRPO, episodes: Any) -> None:
    with pytest.raises(UsageError, match=r"episodes=.* must be a whole number, at least 1"):
        evaluate(agent, Some, episodes=episodes)


def test_other_numbers_are_checked_too(agent: GRPO) -> None:
    for wrong in ({"max_steps": 2.5}, {"max_steps": float("nan")}, {"seed": -1}, {"seed": "3"}):
        with pytest.raises(UsageError, match="must be a whole number"):
            evaluate(agent, Endless, episodes=1, **{"max_steps": 3, **wrong})
    numbers = {"episodes": np.int64(2), "max_steps": 3.0, "seed": np.int64(3)}
    assert evaluate(agent, Endless, **numbers).lengths == [3, 3]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="evaluate takes an agent"):
        evaluate("policy.safetensors", Some)  # type: ignore[arg-type]


def test_an_environment_that_can_be_called_stays_open(agent: GRPO) -> None:
    class Called(Some):
        closed = False

        def __call__(self) -> None: ...

        def close(self) -> None:
            self.closed = True

    env = Called()
    evaluate(agent, env, episodes=1)
    assert not env.closed


def test_an_agent_of_envpool_is_evaluated_by_envpool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It knows environments that Gymnasium does not."""
    made: list[str] = []

    def pool(name: str, n: int, kwargs: Any, seed: int) -> SyncVectorEnv:
        made.append(name)
        return SyncVectorEnv([Some] * n)

    monkeypatch.setattr("grouprl.envs.vector.make_envpool", pool)
    settings: Any = {"n_envs": 2, "collect": "segments", "n_steps": 32, "warmup_steps": 0}
    agent = GRPO("Pong-v5", preset=None, vectorization="envpool", **settings)
    Some.lengths, usual = (3,), Some.lengths
    try:
        seen, run = Evaluations(64, episodes=2), Run(tmp_path / "run", video=False, track=("none",), final_episodes=2)
        agent.learn(64, callback=[seen, run])
        assert evaluate(agent, episodes=1).lengths == [3]
    finally:
        Some.lengths = usual
    assert [value for _, value in seen.history] == [3.0]
    assert made == ["Pong-v5"] * 5  # of training, of two callbacks, of the end of the run, and the last


class Lives(Long):
    """Ends where action 1 comes three times in a row; a policy that never takes it lives for ever."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.ones = 0
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        self.ones = self.ones + 1 if action == 1 else 0
        return np.zeros(1, np.float32), 1.0, self.ones == 3, False, {}


def never(inputs: int, outputs: int) -> torch.nn.Module:
    """Logits of a policy whose most likely action is 0, if barely."""
    layer = torch.nn.Linear(inputs, outputs)
    torch.nn.init.zeros_(layer.weight)
    layer.bias.data = torch.tensor([0.1, 0.0])
    return layer


@pytest.mark.parametrize("limit", [9000, None])
def test_evaluations_of_a_run_last_as_long_as_a_known_time_limit_says(tmp_path: Path, limit: int | None) -> None:
    def make() -> Any:
        return Lives() if limit is None else TimeLimit(Lives(), limit)

    run = Run(tmp_path / "run", video=False, track=("none",), eval_episodes=1, final_episodes=1, eval_every=64)
    agent = GRPO(
        make, preset=None, network=never, n_envs=2, min_steps=64, max_steps=64, learning_rate=1e-9, warmup_steps=0,
        lr_schedule="constant", sticky=0.0,
    )  # fmt: skip
    agent.learn(64, callback=run)
    assert run.result is not None
    assert run.result.summary is not None
    lasts = limit or 5000
    assert run.result.summary["eval"]["mean_return"] == lasts
    assert read_metrics(tmp_path / "run" / "metrics.csv")["eval_return"][-1] == lasts
    assert any("were cut" in note for note in run.result.notes) == (limit is None)

"""Batches that move no parameter: which ones they are, and that nobody overlooks them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from grouprl import GRPO
from grouprl.envs import training

QUICK: dict[str, Any] = {
    "preset": None, "n_envs": 4, "min_steps": 64, "max_steps": 64, "epochs": 2, "warmup_steps": 0, "sticky": 0.0,
}  # fmt: skip


class Survive(gym.Env[Any, Any]):
    """Reward 1 a step. The action must be the sign of what is seen; else the episode is cut, not terminated."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)
    reward = 1.0
    """Of each step."""
    limit = 30
    """Steps of the longest episode."""
    mercy = 0
    """Steps in which nothing is wrong."""

    def _seen(self) -> Any:
        self.x = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.x

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        wrong = (self.x[0] > 0) != action
        self.time += 1
        return self._seen(), self.reward, False, bool(wrong and self.time > self.mercy) or self.time >= self.limit, {}


class Penalty(Survive):
    """Ends are to be found, not avoided."""

    reward = -1.0


class Limited(Survive):
    """Nothing matters: each episode is cut at the same step."""

    limit = mercy = 5


class Balanced(Survive):
    """Rewards that differ, in episodes of equal length and return."""

    limit = mercy = 4

    def step(self, action: Any) -> Any:
        seen, _, *ends = super().step(action)
        return seen, float((-1) ** self.time), *ends


def trained(env: Any, steps: int, **settings: Any) -> tuple[GRPO, list[dict[str, float]], bool]:
    """The agent, its metrics, and whether any parameter moved."""
    agent, rows = GRPO(env, **QUICK | settings), []
    before = torch.cat([p.detach().flatten() for p in agent.policy.parameters()]).clone()
    agent.learn(steps, callback=lambda _, metrics: rows.append(dict(metrics)))
    after = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
    return agent, rows, not torch.equal(before, after)


@pytest.mark.parametrize("estimator", ["baseline", "batch_returns", "outcome", "leave_one_out", "timestep"])
@pytest.mark.parametrize("env", [Survive, Penalty])
def test_ends_that_are_called_truncated_teach(env: Any, estimator: str) -> None:
    _, rows, moved = trained(env, 300, advantage=estimator)
    assert moved
    assert rows[-1]["skipped_batches"] == 0


def test_an_episode_that_only_lasts_longer_is_learned_from() -> None:
    agent = GRPO(Survive, preset=None, advantage="outcome", n_envs=16, min_steps=512, sticky=0.0).learn(12_000)
    assert np.mean(agent.recent_returns[-30:]) > 8  # 2 at the start


def test_a_run_that_learned_nothing_says_so() -> None:
    with pytest.warns(RuntimeWarning, match="nothing was learned, none of 4 batches .* no episode ended early"):
        _, rows, moved = trained(Limited, 256)
    assert not moved
    assert [row["skipped_batches"] for row in rows] == [1, 2, 3, 4]
    with pytest.warns(RuntimeWarning, match="all advantages were equal"):
        _, rows, moved = trained(Balanced, 256, advantage="outcome")
    assert not moved
    assert "optimizer_steps" not in rows[-1]


def test_a_second_call_counts_its_own_batches() -> None:
    agent = GRPO(Survive, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn(100)
    agent.set_env(Limited)
    with pytest.warns(RuntimeWarning, match="none of 1 batches"):
        agent.learn(64)


def test_an_update_that_was_undone_counts_as_skipped() -> None:
    with pytest.warns(RuntimeWarning, match=r"was undone\. Lower learning_rate, or raise kl_stop$"):
        agent, rows, moved = trained(Survive, 256, kl_stop=1e-9, learning_rate=0.5, lr_schedule="constant", epochs=1)
    assert not moved
    assert rows[-1]["skipped_batches"] == len(rows)
    agent.loop.skipped["undone"] -= 1
    agent.loop.skipped["no_signal"] += 1
    said = agent.loop.say_skipped()
    assert said is not None
    assert said.endswith("or set skip_without_signal=False. Lower learning_rate, or raise kl_stop")


def test_learning_from_every_batch_can_be_asked_for() -> None:
    _, rows, moved = trained(Limited, 128, skip_without_signal=False)
    assert moved
    assert rows[-1]["skipped_batches"] == 0


def test_skipped_batches_are_in_checkpoints_and_in_the_summary_of_a_run(tmp_path: Path) -> None:
    gym.register("Limited-v0", Limited)
    try:
        settings = {key: value for key, value in QUICK.items() if key != "preset"}
        run = {"track": ("none",), "video": False, "final_episodes": 2, "eval_episodes": 2}
        result = training.train("Limited-v0", tmp_path / "run", steps=200, preset=None, settings=settings, run=run)
        assert result.summary is not None
        assert result.summary["skipped_batches"] == result.agent.loop.batches > 0
        assert any("nothing was learned" in note for note in result.notes)
        checkpoint = result.folder.latest_checkpoint()
        assert checkpoint is not None
        again = GRPO.from_checkpoint(checkpoint)
        assert again.loop.skipped == result.agent.loop.skipped
        assert again.loop.batches == result.agent.loop.batches
    finally:
        del gym.registry["Limited-v0"]

"""Which episodes of training are kept to be looked at, and that keeping them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from grouprl import GRPO
from grouprl.envs import training
from grouprl.envs.episodes import _numbers, batch_of
from grouprl.envs.recorder import EPISODES_KEPT
from grouprl.envs.rollout import Rollout
from grouprl.runs.episodes import Batch, read_episodes

SMALL: dict[str, Any] = {
    "n_envs": 4,
    "collect": "segments",
    "n_steps": 64,
    "minibatch_size": 64,
    "epochs": 2,
    "warmup_steps": 64,
}
QUIET: dict[str, Any] = {"eval_every": 10_000, "final_episodes": 2, "video": False, "track": ("none",)}


def seen(agent: GRPO, steps: int) -> tuple[list[Rollout], list[Any], list[Batch]]:
    """The batches that an agent learned from: as they were, their advantages, and what is kept of them."""
    rollouts, advantages, kept = [], [], []

    def keep(rollout: Rollout, made: Any, gamma: float) -> None:
        rollouts.append(rollout)
        advantages.append(made)
        loop = agent.loop
        kept.append(batch_of(rollout, made, loop.baseline, agent.policy, step=loop.n_steps, gamma=gamma, estimator="x"))

    agent.loop.on_batch.append(keep)
    agent.learn(steps)
    return rollouts, advantages, kept


def test_a_sample_shows_what_the_update_saw() -> None:
    rollouts, advantages, kept = seen(GRPO("CartPole-v1", **SMALL), 300)
    rollout, made, batch = rollouts[0], advantages[0], kept[0]
    assert batch.samples_in_batch == len(rollout.lengths)
    assert 1 < len(batch.samples) <= 8
    assert batch.names == ["obs[0]", "obs[1]", "obs[2]", "obs[3]"]
    one = batch.samples[0]  # the first of the batch
    rows = np.array(one.at)
    assert one.length == rollout.lengths[0]
    assert one.total == pytest.approx(float(rollout.rewards[: one.length].sum()), rel=1e-3)
    assert one.advantages == pytest.approx(made[rows].tolist(), rel=1e-3)
    assert rollout.observed is not None
    assert one.observation[2] == pytest.approx(rollout.observed[rows, 2].tolist(), rel=1e-3)
    assert one.rewards == [1.0] * len(rows)


def test_the_return_to_go_ends_with_the_baseline_where_the_batch_cut_the_episode() -> None:
    settings = SMALL | {"gamma": 0.9}
    _, _, kept = seen(GRPO("CartPole-v1", **settings), 300)
    samples = [s for s in kept[0].samples if s.values is not None and len(s.at) == s.length]
    ended = next(s for s in samples if s.ended == "terminated")
    going = next(s for s in samples if s.ended == "batch")
    assert ended.to_go[-1] == pytest.approx(1.0)
    assert going.to_go[-1] is not None
    assert going.values is not None
    assert going.to_go[-1] > 1.0  # 1 + 0.9 V(s), and V is above 0 where every step gives 1
    assert going.to_go[0] == pytest.approx(1 + 0.9 * (going.to_go[1] or 0), rel=1e-2)


def test_groups_are_kept_whole() -> None:
    settings = {**SMALL, "collect": "episodes", "group_size": 4, "n_envs": 8, "advantage": "outcome", "min_steps": 64}
    _, _, kept = seen(GRPO("CartPole-v1", **settings), 300)
    assert [s.group for s in kept[0].samples].count(kept[0].samples[0].group) == 4
    assert all(s.values is None for s in kept[0].samples)


class Picture(gym.Env[Any, Any]):
    observation_space = gym.spaces.Box(0, 255, (40, 36, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.full((40, 36, 3), 9, np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.full((40, 36, 3), 9 * self.t, np.uint8), float(action), False, self.t == 8, {}


def test_observations_that_are_pictures_are_shown_as_some() -> None:
    _, _, kept = seen(GRPO(Picture, **SMALL | {"n_steps": 16}), 64)
    one = kept[0].samples[0]
    assert kept[0].names == []
    assert len(one.frames) == 4
    assert len(set(one.frames)) > 1


def test_a_discrete_observation_is_shown_as_its_number() -> None:
    _, _, kept = seen(GRPO("CliffWalking-v1", **SMALL), 300)
    assert kept[0].names == ["state"]
    assert 36.0 in kept[0].samples[0].observation[0]  # where every episode begins


def test_keeping_episodes_changes_no_number() -> None:
    plain, watched = (GRPO("CartPole-v1", seed=5, **SMALL) for _ in range(2))
    plain.learn(1000)
    seen(watched, 1000)
    for a, b in zip(plain.policy.parameters(), watched.policy.parameters(), strict=True):
        assert bool((a == b).all())
    assert plain.recent_returns == watched.recent_returns


def test_a_run_keeps_some_batches_and_shows_them_on_a_page(tmp_path: Path) -> None:
    result = training.train(
        "CartPole-v1", tmp_path / "r", preset=None, steps=12_000, settings=SMALL, run=QUIET, progress_bar=False
    )
    kept = list(read_episodes(result.folder.episodes_path))
    assert 10 <= len(kept) <= EPISODES_KEPT + 1
    assert [one.step for one in kept] == sorted({one.step for one in kept})
    assert result.folder.episodes_page.stat().st_size < 1_000_000
    assert "episodes.html" in result.folder.report_page.read_text()


def test_numbers_keep_four_digits() -> None:
    given = [0.0, 1.23456, -98765.4, 3e30, float("nan"), float("inf"), 0.1, -2.325e-29]
    made = _numbers(torch.tensor(given, dtype=torch.float64))
    assert made == [0.0, 1.235, -98770.0, 3e30, None, None, 0.1, -2.325e-29]
    assert _numbers(torch.tensor([0.1, 1 / 3])) == [0.1, 0.3333]  # of float32, whose digits go on

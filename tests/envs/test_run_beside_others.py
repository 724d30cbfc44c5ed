"""A run of an agent that another run has left, and runs and callbacks side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from grouprl import GRPO
from grouprl.envs import training
from grouprl.envs.callbacks import Run
from grouprl.runs import RunFolder, read_metrics

SMALL: dict[str, Any] = {
    "n_envs": 4, "collect": "segments", "n_steps": 64, "minibatch_size": 64, "epochs": 2, "warmup_steps": 64,
}  # fmt: skip
QUIET: dict[str, Any] = {
    "eval_every": 500, "checkpoint_every": 500, "eval_episodes": 2, "final_episodes": 2, "keep_checkpoints": 99,
    "track": ("none",), "video": False,
}  # fmt: skip


def agent_of(steps: int, folder: Path) -> GRPO:
    """An agent whose run in ``folder`` is over, and whose threshold it had reached."""
    run = Run(folder, **QUIET)
    agent = GRPO("CartPole-v1", preset=None, seed=1, **SMALL)
    agent.learn(steps, callback=run)
    return agent


@pytest.mark.parametrize("how", ["from a checkpoint", "resumed", "own words"])
def test_a_new_run_of_an_agent_that_a_run_has_left_keeps_books_of_its_own(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    agent_of(1500, tmp_path / "first")
    if how == "resumed":
        agent = training.resume(tmp_path / "first", steps=1800, progress_bar=False).agent
    else:
        agent = GRPO.from_checkpoint(RunFolder.open(tmp_path / "first").checkpoints()[-1])
    if how == "own words":
        agent.checkpoint(tmp_path / "c.safetensors", extra={"mine": 3})
        agent = GRPO.from_checkpoint(tmp_path / "c.safetensors")
        assert agent.extra == {"mine": 3}
    else:
        agent.extra |= {"solved_at": [7, 0.5], "next_eval": 10**9, "next_checkpoint": 10**9}
    begun = agent.num_timesteps
    run = Run(tmp_path / "second", **QUIET)
    agent.learn(1500, callback=run)
    assert "damaged" not in caplog.text
    assert "was changed" not in caplog.text
    assert run.result is not None
    assert run.result.summary is not None
    assert run.result.summary["solved_at_steps"] is None
    metrics = read_metrics(tmp_path / "second" / "metrics.csv")
    assert metrics["step"][0] > begun
    assert 2 <= np.isfinite(metrics["eval_return"]).sum() <= 3
    assert len(RunFolder.open(tmp_path / "second").checkpoints()) >= 3
    assert (tmp_path / "second" / "episodes.jsonl").stat().st_size > 0

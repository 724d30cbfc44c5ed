"""A run of an agent that another run has left, and runs and callbacks side by side."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import call
from grouprl import GRPO, UsageError
from grouprl.envs import training
from grouprl.envs.callbacks import Evaluations, Run, StopAtReturn
from grouprl.runs import RunFolder, read_metrics
from grouprl.runs.state import load_state

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


def learn(steps: int, *callbacks: Any) -> GRPO:
    return GRPO("CartPole-v1", preset=None, seed=1, **SMALL).learn(steps, callback=list(callbacks))


def numbers(folder: Path) -> dict[str, list[float]]:
    """What a run's metrics say, but for times and memory."""
    metrics = read_metrics(folder / "metrics.csv")
    timed = ("time_", "train_seconds", "steps_per_second", "cpu_wait", "memory_gb")
    return {name: np.nan_to_num(values).tolist() for name, values in metrics.items() if not name.startswith(timed)}


def test_two_runs_in_one_list_both_leave_all_that_one_alone_leaves(tmp_path: Path) -> None:
    often = QUIET | {"eval_every": 250}
    learn(1500, Run(tmp_path / "alone", **QUIET))
    learn(1500, Run(tmp_path / "alone, often", **often))
    both = [Run(tmp_path / "one", **QUIET), Run(tmp_path / "other", **often)]
    learn(1500, *both)
    for name, alone in (("one", "alone"), ("other", "alone, often")):
        one, other = tmp_path / name, tmp_path / alone
        assert (one / "episodes.jsonl").read_bytes() == (other / "episodes.jsonl").read_bytes()
        assert numbers(one) == numbers(other)
        assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


def test_an_evaluation_before_a_run_is_seen_by_what_comes_after_it(tmp_path: Path) -> None:
    run = Run(tmp_path / "r", **QUIET | {"eval_every": 10**6})
    learn(1500, evaluations := Evaluations(250, episodes=1), run, StopAtReturn(1.0, "eval_return"))
    assert len(evaluations.history) == 1
    assert not np.isfinite(read_metrics(tmp_path / "r" / "metrics.csv")["eval_return"]).any()


def interrupt(agent: GRPO, metrics: dict[str, float]) -> None:
    """As Ctrl-C after more than 1,500 steps, of which runs after it in the list hear in the same update."""
    if agent.num_timesteps > 1500:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_stops_both_of_two_runs_and_either_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grouprl.envs.loop.RESTART_AFTER", 0.1)  # scheduled checkpoints begin fresh episodes
    learn(2500, Run(tmp_path / "whole", **QUIET))
    both = [Run(tmp_path / name, **QUIET) for name in ("one", "other")]
    learn(2500, interrupt, *both)
    whole, _ = load_state(tmp_path / "whole" / "model.safetensors")
    for run in both:
        assert run.result is not None
        assert not run.result.finished
        assert training.resume(run.folder, progress_bar=False).finished
        resumed, _ = load_state(run.folder / "model.safetensors")
        assert all(bool((whole[name] == resumed[name]).all()) for name in whole)
        assert numbers(run.folder) == numbers(tmp_path / "whole")


def half(agent: GRPO, metrics: dict[str, float]) -> None:
    metrics["half"] = metrics["return_mean"] / 2


class Whole:
    """Hears what the run and its callbacks before this one have added, and stops the run after so many steps."""

    def __init__(self, stop: float = float("inf")) -> None:
        self.stop, self.heard = stop, dict[int, float]()

    def __call__(self, agent: GRPO, metrics: dict[str, float]) -> None:
        self.heard[agent.num_timesteps] = metrics["half"]
        if agent.num_timesteps > self.stop:
            self.stop = float("inf")
            os.kill(os.getpid(), signal.SIGINT)


def test_callbacks_beside_a_run_are_noted_missed_aloud_and_given_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = Whole()
    learn(2000, half, Run(tmp_path / "whole", **QUIET), heard)
    first, then = Whole(stop=900), Whole()
    learn(2000, half, run := Run(tmp_path / "cut", **QUIET), first)
    noted = {"before": [f"{__name__}:half"], "after": [f"{__name__}:Whole"]}
    assert RunFolder.open(tmp_path / "cut").read_config()["callbacks"] == noted
    shutil.copytree(tmp_path / "cut", tmp_path / "without")
    with pytest.raises(UsageError, match="a callback is a function"):
        training.resume(run.folder, callback=3, progress_bar=False)  # type: ignore[arg-type]
    assert training.resume(run.folder, callback=[half, then], progress_bar=False).finished
    assert "callbacks beside Run" not in caplog.text
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert first.heard | then.heard == heard.heard
    other = Whole()
    assert training.resume(tmp_path / "without", callback=half, progress_bar=False).finished
    assert f"goes on without {__name__}:Whole; where they ended training" in caplog.text
    assert not other.heard
    assert RunFolder.open(tmp_path / "without").read_config()["callbacks"] == noted
    assert call("train", "--config", run.folder / "config.yaml", "--out", tmp_path / "again", "--quiet") == 0
    assert "had callbacks, which a command does not call" in capsys.readouterr().out


def test_a_callback_that_is_given_anew_is_noted_too(tmp_path: Path) -> None:
    learn(600, Run(tmp_path / "r", **QUIET))
    assert "callbacks" not in RunFolder.open(tmp_path / "r").read_config()
    heard: list[int] = []

    def new(agent: GRPO, metrics: dict[str, float]) -> bool:
        heard.append(agent.num_timesteps)
        return len(heard) < 2

    result = training.resume(tmp_path / "r", steps=2000, callback=new, progress_bar=False)
    assert result.agent.num_timesteps == heard[-1] < 2000
    after = RunFolder.open(tmp_path / "r").read_config()["callbacks"]["after"]
    assert [name.rpartition(".")[2] for name in after] == ["new"]

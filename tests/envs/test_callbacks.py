"""Ready-made callbacks: a run folder, checkpoints, evaluations, an early end, videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from grouprl import GRPO, UsageError
from grouprl.doctor import examine
from grouprl.envs import training
from grouprl.envs.callbacks import Checkpoints, Evaluations, Run, StopAtReturn, Videos
from grouprl.runs import RunFolder, read_metrics

SMALL: dict[str, Any] = {
    "n_envs": 4, "collect": "segments", "n_steps": 64, "minibatch_size": 64, "epochs": 2, "warmup_steps": 64,
}  # fmt: skip
QUIET: dict[str, Any] = {"eval_episodes": 4, "final_episodes": 4, "track": ("none",)}


class Mine(gym.Env[Any, Any]):
    """Reward 1 for action 1, in episodes of ten steps; renders."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - as Gymnasium has it

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), float(action), False, self.t == 10, {}

    def render(self) -> Any:
        return np.full((32, 48, 3), 20 * self.t, np.uint8)


def make() -> Mine:
    return Mine()


def test_an_environment_of_ones_own_leaves_the_folder_that_the_command_leaves(tmp_path: Path) -> None:
    run = Run(tmp_path / "own", **QUIET)
    agent = GRPO(lambda: Mine("rgb_array"), seed=1, **SMALL)
    assert agent.learn(4000, callback=run) is agent
    assert run.result is not None
    assert run.result.summary is not None
    command = training.train(
        "CartPole-v1", tmp_path / "command", preset=None, steps=1000, settings=SMALL, run=QUIET, progress_bar=False
    )
    names = [{path.name for path in folder.iterdir()} for folder in (tmp_path / "own", command.folder.path)]
    assert names[0] == names[1]
    assert (tmp_path / "own" / "episode.mp4").stat().st_size > 0
    metrics = read_metrics(tmp_path / "own" / "metrics.csv")
    assert np.isfinite(metrics["eval_return"]).sum() >= 10
    assert run.result.summary["eval"]["mean_return"] == 10.0
    assert run.result.summary["total_steps"] == agent.num_timesteps
    assert not [one for one in examine(tmp_path / "own") if one.ill]
    assert GRPO.load(tmp_path / "own").num_timesteps == agent.num_timesteps
    agent.learn(300)  # and the agent goes on, without being recorded
    assert len(read_metrics(tmp_path / "own" / "metrics.csv")["step"]) == len(metrics["step"])


def test_a_second_call_of_learn_is_a_run_of_its_own(tmp_path: Path) -> None:
    agent = GRPO(make, **SMALL).learn(1000)
    run = Run(tmp_path / "r", eval_every=500, video=False, **QUIET)
    agent.learn(1000, callback=run)
    metrics = read_metrics(tmp_path / "r" / "metrics.csv")
    assert metrics["step"][0] > 1000
    assert 2 <= np.isfinite(metrics["eval_return"]).sum() <= 3
    config = RunFolder.open(tmp_path / "r").read_config()
    assert config["run"]["total_timesteps"] >= 2000


def test_a_run_that_was_stopped_goes_on_with_its_environment_as_if_it_had_not(tmp_path: Path) -> None:
    def learn(folder: Path, *others: Any) -> Run:
        run = Run(folder, video=False, checkpoint_every=500, **QUIET)
        GRPO(make, seed=2, **SMALL).learn(3000, callback=[run, *others])
        return run

    def stop(agent: GRPO, metrics: Any) -> None:
        run = next(iter(stopped))
        assert run._recorder is not None
        run._recorder.stopped = agent.num_timesteps > 1200

    whole = learn(tmp_path / "whole")
    stopped = [Run(tmp_path / "cut", video=False, checkpoint_every=500, **QUIET)]
    GRPO(make, seed=2, **SMALL).learn(3000, callback=[stopped[0], stop])
    assert stopped[0].result is not None
    assert not stopped[0].result.finished
    with pytest.raises(UsageError, match=r"set_env|cannot be made|env"):
        training.resume(tmp_path / "cut", progress_bar=False)
    assert training.resume(tmp_path / "cut", env=make, progress_bar=False).finished
    one, other = read_metrics(tmp_path / "cut" / "metrics.csv"), read_metrics(whole.folder / "metrics.csv")
    np.testing.assert_array_equal(one["return_mean"], other["return_mean"])
    np.testing.assert_array_equal(one["approx_kl"], other["approx_kl"])


def test_what_a_run_cannot_be_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="eval_evry"):
        Run(tmp_path / "r", eval_evry=10)
    with pytest.raises(UsageError, match="leave it out"):
        Run(tmp_path / "r", total_timesteps=10)
    with pytest.raises(UsageError, match="callable"):
        GRPO(Mine(), **SMALL | {"n_envs": 1}).learn(100, callback=Run(tmp_path / "r"))
    with pytest.raises(UsageError, match="is given to learn"):
        Run(tmp_path / "r")(GRPO(make, **SMALL), {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    agent = GRPO(make, **SMALL)
    with pytest.raises(UsageError, match="not empty"):
        agent.learn(100, callback=Run(tmp_path / "full"))
    assert agent.num_timesteps == 0
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_a_failure_leaves_the_last_checkpoint_and_names_it(tmp_path: Path) -> None:
    class Breaks(Mine):
        def step(self, action: Any) -> Any:
            made = super().step(action)
            return (*made[:1], float("nan") if len(list(tmp_path.glob("r/checkpoints/*"))) else made[1], *made[2:])

    from grouprl.errors import TrainingError

    agent = GRPO(lambda: Breaks(), **SMALL)
    with pytest.raises(TrainingError, match="the last good checkpoint is"):
        agent.learn(
            4000, callback=Run(tmp_path / "r", checkpoint_every=300, video=False, eval_every=10**6, track=("none",))
        )


def test_checkpoints_are_kept_up_to_a_number_and_can_be_gone_on_from(tmp_path: Path) -> None:
    keeper = Checkpoints(tmp_path, every=300, keep=2)
    agent = GRPO(make, **SMALL).learn(2000, callback=keeper)
    assert sorted(tmp_path.iterdir()) == keeper.written
    assert len(keeper.written) == 2
    again = GRPO.from_checkpoint(keeper.written[-1], make)
    assert 0 < again.num_timesteps <= agent.num_timesteps
    again.learn(300)


def test_evaluations_are_remembered_and_the_best_policy_is_saved(tmp_path: Path) -> None:
    evaluations = Evaluations(500, episodes=4, best=tmp_path / "best.safetensors")
    agent = GRPO(make, **SMALL).learn(3000, callback=evaluations)
    steps, returns = zip(*evaluations.history, strict=True)
    assert list(steps) == sorted(steps)
    assert 5 <= len(steps) <= 7
    assert max(returns) == evaluations.best_return == 10.0
    first_best = steps[returns.index(10.0)]
    assert GRPO.load(tmp_path / "best").num_timesteps == first_best <= agent.num_timesteps


def test_evaluating_changes_nothing_of_training() -> None:
    plain = GRPO(make, seed=4, **SMALL).learn(2000)
    watched = GRPO(make, seed=4, **SMALL).learn(2000, callback=Evaluations(300, episodes=3))
    assert plain.recent_returns == watched.recent_returns


@pytest.mark.parametrize(
    "callbacks",
    [[StopAtReturn(9.0)], [Evaluations(256, episodes=4), StopAtReturn(10.0, "eval_return")]],
    ids=["of training", "of an evaluation"],
)
def test_training_ends_once_a_return_is_reached(callbacks: list[Any]) -> None:
    agent = GRPO(make, **SMALL | {"learning_rate": 3e-3}).learn(50_000, callback=callbacks)
    assert 256 <= agent.num_timesteps < 30_000


def test_videos_are_filmed_when_due_and_a_reason_is_given_where_they_cannot_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    GRPO(lambda: Mine("rgb_array"), **SMALL).learn(1200, callback=Videos(tmp_path / "v", every=500))
    assert len(list((tmp_path / "v").glob("step_*.mp4"))) == 2
    GRPO(make, **SMALL).learn(600, callback=Videos(tmp_path / "w", every=500))
    assert "render_mode" in caplog.text


@pytest.mark.parametrize(
    "made", [lambda: Checkpoints(".", 0), lambda: Checkpoints(".", 5, keep=0), lambda: Evaluations(0)]
)
def test_numbers_that_cannot_be_are_refused(made: Any) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        made()

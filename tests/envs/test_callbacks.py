"""Ready-made callbacks: a run folder, checkpoints, evaluations, an early end, videos."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from command_line import call
from grouprl import GRPO, UsageError, evaluate
from grouprl.bench.folders import of_folders
from grouprl.doctor import examine
from grouprl.envs import training
from grouprl.envs.callbacks import Checkpoints, Evaluations, Run, StopAtReturn, Videos
from grouprl.envs.metric_names import NOW_AND_THEN
from grouprl.envs.run_settings import plan
from grouprl.envs.update import UpdateStats
from grouprl.envs.watch import make_rendering
from grouprl.runs import RunFolder, read_metrics
from grouprl.runs.state import load_state

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


class Endless(gym.Env[Any, Any]):
    """Pays 1 for each step and never ends."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 1.0, False, False, {}


def test_evaluations_cut_episodes_that_do_not_end() -> None:
    evaluations = Evaluations(64, episodes=2, env=Endless, max_steps=7)
    GRPO(Endless, preset=None, n_envs=2, collect="segments", n_steps=32, skip_without_signal=False).learn(
        64, callback=evaluations
    )
    assert evaluations.best_return == 7.0
    with pytest.raises(UsageError, match="max_steps=0"):
        Evaluations(64, max_steps=0)


def test_callbacks_serve_one_agent_after_another(tmp_path: Path) -> None:
    evaluations, keeper = Evaluations(500, episodes=1), Checkpoints(tmp_path / "c", every=500, keep=2)
    videos = Videos(tmp_path / "v", every=500)
    first: list[Any] = []
    for seed in range(3):
        for file in tmp_path.glob("v/*"):
            file.unlink()
        evaluations.history.clear()
        agent = GRPO(lambda: Mine("rgb_array"), seed=seed, **SMALL)
        agent.learn(1200, callback=[evaluations, keeper, videos])
        steps = [step for step, _ in evaluations.history]
        films = sorted(path.name for path in tmp_path.glob("v/*"))
        first = first or [steps, films]
        assert [steps, films] == first
        assert len(steps) == len(films) == 2
        assert sorted((tmp_path / "c").iterdir()) == keeper.written
        assert GRPO.from_checkpoint(keeper.written[-1], make).config.seed == seed


def test_what_evaluations_remember_is_of_one_agent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluations = Evaluations(256, episodes=2, best=tmp_path / "best")
    good = GRPO(lambda: Lasts(9), **SMALL).learn(600, callback=evaluations)
    assert evaluations.best_return == 9.0
    seen = evaluations.history
    good.learn(600, callback=evaluations)
    assert evaluations.history is seen  # of the same agent
    assert not caplog.text
    GRPO(lambda: Lasts(3), seed=7, **SMALL).learn(300, callback=evaluations)
    assert (evaluations.best_return, len(evaluations.history)) == (3.0, 1)
    assert GRPO.load(tmp_path / "best").config.seed == 7
    assert "the best policy of the agent before with a mean return of 9" in caplog.text
    assert len(seen) >= 4


def test_a_schedule_begins_where_the_agent_stands(tmp_path: Path) -> None:
    agent = GRPO(make, seed=1, **SMALL).learn(2200)
    evaluations, keeper = Evaluations(1000, episodes=1), Checkpoints(tmp_path, every=1000)
    agent.learn(2000, callback=[evaluations, keeper])
    steps = [step for step, _ in evaluations.history]
    assert [step // 1000 for step in steps] == [3, 4]
    assert all(step % 1000 < 256 for step in steps)
    assert len(keeper.written) == 2


def test_another_call_of_learn_goes_on_counting() -> None:
    evaluations, whole = Evaluations(500, episodes=1), Evaluations(500, episodes=1)
    agent = GRPO(make, seed=1, **SMALL)
    for _ in range(6):
        agent.learn(256, callback=evaluations)
    GRPO(make, seed=1, **SMALL).learn(agent.num_timesteps, callback=whole)
    assert [step for step, _ in evaluations.history] == [step for step, _ in whole.history]


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


@pytest.mark.parametrize("rewards", [[0.9], [0.3, 0.3, 0.3], [0.1] * 9, [-0.7]])
@pytest.mark.parametrize("metric", ["return_mean", "return_batch"])
def test_a_return_that_is_the_wanted_one_but_for_rounding_is_reached(rewards: list[float], metric: str) -> None:
    class Paying(Mine):
        def step(self, action: Any) -> Any:
            seen, _, _, _, info = super().step(action)
            return seen, rewards[self.t - 1], False, self.t == len(rewards), info

    stop = StopAtReturn(round(sum(rewards), 1), metric)
    agent = GRPO(Paying, **SMALL | {"skip_without_signal": False}).learn(5_000, callback=stop)
    done = agent.num_timesteps
    assert done < 2_000
    more = StopAtReturn(round(sum(rewards), 1) + 1e-6, metric)
    assert agent.learn(500, callback=more).num_timesteps >= done + 500


@pytest.mark.parametrize(("metric", "said"), [("retrun_mean", "did you mean 'return_mean'"), ("x", "there are agree")])
def test_a_metric_that_is_none_is_refused(metric: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"metric={metric!r} is no metric of an update; {said}"):
        GRPO(make, **SMALL).learn(1000, callback=StopAtReturn(1, metric))


def test_a_metric_may_come_now_and_then_or_from_a_callback_of_ones_own() -> None:
    def half(agent: GRPO, metrics: dict[str, float]) -> None:
        metrics["half"] = metrics["return_mean"] / 2

    callbacks = [half, StopAtReturn(99.0, "half"), *(StopAtReturn(1e9, name) for name in NOW_AND_THEN)]
    assert GRPO(make, **SMALL).learn(600, callback=callbacks).num_timesteps >= 600


def test_every_metric_of_an_update_that_is_missing_in_another_is_known() -> None:
    rows: list[dict[str, float]] = []
    agent = GRPO(make, **SMALL, preset=None, lr_schedule="adaptive", reuse=2)
    agent.learn(1000, callback=[Evaluations(500, episodes=1), lambda agent, metrics: rows.append(metrics)])
    always = set.intersection(*map(set, rows))
    assert set.union(*map(set, rows)) - always <= NOW_AND_THEN
    assert {field.name for field in fields(UpdateStats)} - {"undone"} <= NOW_AND_THEN


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


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: Run("r", checkpoint_every="abc"),
            r"checkpoint_every='abc' \(str\) must be a whole number, at least 1",
        ),
        (lambda: Run("r", eval_episodes=2.5), r"eval_episodes=2.5 \(float\) must be a whole number, at least 1"),
        (lambda: Run("r", keep_checkpoints=True), r"keep_checkpoints=True \(bool\) must be a whole number"),
        (lambda: Run("r", video="nein"), r"video='nein' \(str\) must be True or False"),
        (
            lambda: Run("r", track="none"),
            r"track='none' \(str\) must be a list of names, .* Allowed: tensorboard, wandb",
        ),
        (lambda: Run("r", track=None), r"track=None \(NoneType\) must be a list of names"),
        (lambda: Run("r", overwrite="no"), r"overwrite='no' \(str\) must be True or False"),
        (lambda: training.train("CartPole-v1", "r", steps="abc"), r"steps='abc' \(str\) must be a whole number"),
        (lambda: training.train("CartPole-v1", "r", overwrite="no"), r"overwrite='no' \(str\) must be True or False"),
        (lambda: training.resume("r", steps=0.5), r"steps=0.5 \(float\) must be a whole number"),
        (lambda: Evaluations("often"), r"every='often' \(str\) must be a whole number"),
        (lambda: Evaluations(10, episodes="2"), r"episodes='2' \(str\) must be a whole number"),
        (lambda: Checkpoints("c", 5.5), r"every=5.5 \(float\) must be a whole number"),
        (lambda: Checkpoints("c", 5, keep=None), r"keep=None \(NoneType\) must be a whole number"),
        (lambda: Videos("v", 5, episodes=0), r"episodes=0 \(int\) must be a whole number, at least 1"),
        (lambda: StopAtReturn("195"), r"value='195' \(str\) must be a number, such as 195"),
        (lambda: StopAtReturn(float("nan")), r"value=nan \(float\) must be a number"),
        (lambda: StopAtReturn(True), r"value=True \(bool\) must be a number"),
        (lambda: StopAtReturn(195, 3), r"metric=3 \(int\) must be the name of a metric"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(made: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        made()


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    run = plan(1e3, {"eval_episodes": 1e1, "keep_checkpoints": np.int64(2), "track": ["none"], "video": np.False_})
    numbers = (run.total_timesteps, run.eval_every, run.checkpoint_every, run.eval_episodes, run.keep_checkpoints)
    assert numbers == (1000, 50, 100, 10, 2)
    assert all(type(number) is int for number in numbers)
    assert (run.track, run.video) == (("none",), False)
    evaluations = Evaluations(5e2, episodes=2.0)
    keeper = Checkpoints(tmp_path / "c", every=5e2, keep=1.0)
    GRPO(make, **SMALL).learn(1e3, callback=[evaluations, keeper, StopAtReturn(np.float32(1e9))])
    assert len(evaluations.history) == 2
    assert len(keeper.written) == 1


class NoMethod(Mine):
    render = gym.Env.render


class Undeclared(NoMethod):
    metadata = {}  # noqa: RUF012 - as Gymnasium has it


class FailsWhenSeen(Mine):
    def step(self, action: Any) -> Any:
        if self.render_mode is not None:
            raise RuntimeError("no display")
        return super().step(action)


class CannotBeMade(Mine):
    def __init__(self, render_mode: str | None = None) -> None:
        if render_mode is not None:
            raise RuntimeError("no OpenGL")
        super().__init__()


@pytest.mark.parametrize(
    ("env", "why"),
    [
        (NoMethod, "NotImplementedError"),
        (Undeclared, "cannot render"),
        (FailsWhenSeen, "no display"),
        (CannotBeMade, "no OpenGL"),
    ],
)
def test_a_film_that_fails_costs_only_the_film(env: type[Mine], why: str, tmp_path: Path) -> None:
    gym.register("Seen-v0", entry_point=env)
    try:
        run = training.train(
            "Seen-v0", tmp_path / "run", preset=None, steps=600, settings=SMALL, run=QUIET, progress_bar=False
        )
    finally:
        del gym.registry["Seen-v0"]
    assert run.summary is not None
    assert [note for note in run.notes if note.startswith("no video") and why in note]
    names = {path.name for path in run.folder.path.iterdir()}
    assert {"summary.json", "report.html", "episodes.html"} <= names
    assert "episode.mp4" not in names


@pytest.mark.parametrize("mode", ["rgb_array", None])
def test_a_render_mode_of_training_does_not_stand_in_the_way_of_a_film(mode: str | None, tmp_path: Path) -> None:
    gym.register("Filmed-v0", entry_point=Mine)
    try:
        run = training.train(
            "Filmed-v0", tmp_path / "run", preset=None, steps=600, settings=SMALL, run=QUIET, progress_bar=False,
            env_kwargs={"render_mode": mode},
        )  # fmt: skip
        assert not [note for note in run.notes if "no video" in note]
        assert (run.folder.path / "episode.mp4").stat().st_size > 0
        assert call("play", run.folder.path, "--episodes", "1", "--video", tmp_path / "play.mp4") == 0
        assert make_rendering(run.agent, "human").render_mode == "human"  # pictures shown by Gymnasium's own wrapper
    finally:
        del gym.registry["Filmed-v0"]


def schedule(agent: GRPO, steps: int, run: Run, stop: int | None = None) -> list[float]:
    """Train; the learning rates of the updates. With ``stop`` the run ends after so many, as by Ctrl-C."""
    rates: list[float] = []

    def heard(agent: GRPO, metrics: dict[str, float]) -> bool:
        rates.append(metrics["learning_rate"])
        if len(rates) == stop:
            assert run._recorder is not None
            run._recorder.stopped = True
            return False
        return True

    agent.learn(steps, callback=[run, heard])
    return rates


def test_a_stopped_run_of_an_agent_that_had_learned_before_goes_on_by_its_own_schedule(tmp_path: Path) -> None:
    first = GRPO("CartPole-v1", preset=None, seed=1, lr_schedule="linear", sticky=0.5, **SMALL).learn(2000)
    first.save(tmp_path / "m")
    runs = [Run(tmp_path / name, video=False, **QUIET) for name in ("whole", "cut")]
    whole, cut = GRPO.load(tmp_path / "m"), GRPO.load(tmp_path / "m")
    rates = schedule(whole, 2000, runs[0])
    assert schedule(cut, 2000, runs[1], stop=3) == rates[:3]
    resumed = training.resume(tmp_path / "cut")
    assert read_metrics(tmp_path / "cut" / "metrics.csv")["learning_rate"].tolist() == rates
    one, other = whole.policy.state_dict(), resumed.agent.policy.state_dict()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    for result, agent in ((runs[0].result, whole), (resumed, resumed.agent)):
        assert result is not None
        assert result.summary is not None
        made = agent.num_timesteps - first.num_timesteps
        assert result.summary["total_steps"] == agent.num_timesteps
        assert result.summary["steps_per_second"] == pytest.approx(made / agent.train_seconds)


def test_repeating_actions_fades_as_soon_for_an_agent_that_was_loaded(tmp_path: Path) -> None:
    def repeated(agent: GRPO) -> list[float]:
        found: list[float] = []
        agent.learn(2000, callback=lambda agent, metrics: found.append(metrics["sticky"]))
        return found

    kept = GRPO(make, preset=None, seed=1, **SMALL)
    repeated(kept)
    kept.save(tmp_path / "m")
    loaded = GRPO.load(tmp_path / "m", make)
    for agent in (kept, loaded):
        fading = repeated(agent)
        assert fading[0] > 0
        assert not any(fading[len(fading) // 2 + 1 :])  # half of the budget is where it ends


def test_evaluations_step_no_environment_of_training() -> None:
    env = Mine()
    agent = GRPO(env, preset=None, warmup_steps=0)
    for shared in (env, gym.vector.SyncVectorEnv([lambda: env])):
        with pytest.raises(UsageError, match="the environment that Mine is trained on"):
            agent.learn(100, callback=Evaluations(50, env=shared))
    other = Evaluations(50, episodes=1, env=Mine())
    agent.learn(100, callback=other)
    assert other.history


def test_evaluations_of_an_id_can_have_other_arguments() -> None:
    gym.register("Lasts-v0", entry_point=Lasts)
    try:
        agent = GRPO("Lasts-v0", preset=None, env_kwargs={"length": 5}, seed=1, **SMALL)
        other = Evaluations(100, episodes=1, env_kwargs={"length": 7})
        agent.learn(300, callback=other)
        assert {value for _, value in other.history} == {7.0}
        lengths = [evaluate(agent, episodes=2, env_kwargs=given).lengths for given in (None, {"length": 7}, {})]
        assert lengths == [[5, 5], [7, 7], [9, 9]]
    finally:
        del gym.registry["Lasts-v0"]
    with pytest.raises(UsageError, match="only goes with an environment id"):
        evaluate(GRPO(make, preset=None, warmup_steps=0), env_kwargs={"length": 7})


class Lasts(Mine):
    """Episodes of ``length`` steps with reward 1 each."""

    def __init__(self, length: int = 9, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.length = length

    def step(self, action: Any) -> Any:
        seen, *_ = super().step(action)
        return seen, 1.0, self.t == self.length, False, {}


def wide(inputs: int, outputs: int) -> torch.nn.Module:
    return torch.nn.Linear(inputs, outputs)


def first_reward(rewards: torch.Tensor, lengths: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    return rewards - rewards[0]


def test_a_run_names_what_was_its_own_and_is_resumed_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: Any = {"network": wide, "advantage_function": first_reward}
    for name, given in (("plain", {}), ("own", own)):
        agent = GRPO("CartPole-v1", preset=None, seed=1, sticky=0.5, **SMALL, **given)
        schedule(agent, 1500, Run(tmp_path / name, video=False, **QUIET))
    config = RunFolder.open(tmp_path / "own").read_config()
    assert config["own"] == {
        "network": f"{__name__}:wide", "advantage_function": f"{__name__}:first_reward",
    }  # fmt: skip
    assert "own" not in RunFolder.open(tmp_path / "plain").read_config()
    assert len(of_folders([tmp_path / "plain", tmp_path / "own"]).settings) == 2  # two methods, and not two runs of one
    assert call("train", "--config", tmp_path / "own" / "config.yaml", "--out", tmp_path / "again") == 2
    assert f"network ({__name__}:wide)" in capsys.readouterr().err

    cut = Run(tmp_path / "cut", video=False, **QUIET)
    schedule(GRPO("CartPole-v1", preset=None, seed=1, sticky=0.5, **SMALL, **own), 1500, cut, stop=2)
    with pytest.raises(UsageError, match=r"pass the same builder as network=..., also to grouprl.envs.training.resume"):
        training.resume(tmp_path / "cut")
    resumed = training.resume(tmp_path / "cut", **own)
    assert resumed.finished
    one, other = (load_state(tmp_path / name / "model.safetensors")[0] for name in ("own", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)

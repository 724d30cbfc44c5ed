"""A run leaves what it promises, and a resumed run is the run that never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grouprl import GRPO, UsageError
from grouprl.envs import recorder, training
from grouprl.errors import DamagedFileError, TrainingError
from grouprl.runs import read_metrics
from grouprl.runs.state import load_state

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "robustness"))
from short_runs import ENV_RUN, ENV_SETTINGS, is_time

QUIET: dict[str, Any] = {**ENV_RUN, "video": False, "track": ("none",)}


def small_run(out: Path, env: str = "CartPole-v1", steps: int = 3000, **extra: Any) -> recorder.RunResult:
    run = QUIET | {"checkpoint_every": 700, "keep_checkpoints": 99} | extra.pop("run", {})
    return training.train(
        env, out, preset=None, steps=steps, seed=3, settings=ENV_SETTINGS | extra.pop("settings", {}), run=run, **extra
    )


def same_metrics(one: Path, other: Path) -> None:
    a, b = read_metrics(one / "metrics.csv"), read_metrics(other / "metrics.csv")
    assert a.keys() == b.keys()
    assert len(a["step"]) > 3
    for name in filter(lambda name: not is_time(name), a):
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def same_weights(one: Path, other: Path) -> None:
    a, b = load_state(one / "model.safetensors")[0], load_state(other / "model.safetensors")[0]
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_folder_holds_everything_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = training.train(
        "CartPole-v1", out, preset=None, steps=2000, seed=1, settings=ENV_SETTINGS,
        run={"eval_every": 500, "eval_episodes": 2, "final_episodes": 3, "checkpoint_every": 600},
    )  # fmt: skip
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.yaml", "metrics.csv", "model.safetensors", "checkpoints", "tensorboard", "curve.png", "episode.mp4",
        "summary.json", "episodes.jsonl", "episodes.html", "report.html",
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert {
        "env_id",
        "seed",
        "total_steps",
        "train_seconds",
        "steps_per_second",
        "solved_at_steps",
        "solved_at_seconds",
        "eval",
    } <= set(summary)
    assert summary["env_id"] == "CartPole-v1"
    assert summary["seed"] == 1
    assert summary["eval"]["episodes"] == 3
    assert {"mean_return", "std_return", "min", "max"} <= set(summary["eval"])
    assert result.finished
    metrics = read_metrics(out / "metrics.csv")
    assert metrics["step"][-1] == summary["total_steps"] >= 2000
    assert np.isfinite(metrics["eval_return"]).sum() >= 3
    assert GRPO.load(out).num_timesteps == summary["total_steps"]


def test_config_yaml_reproduces_the_run(tmp_path: Path) -> None:
    small_run(tmp_path / "a")
    saved = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    run = dict(saved["run"]) | {"track": tuple(saved["run"]["track"])}
    steps = run.pop("total_timesteps")
    training.train(saved["env_id"], tmp_path / "b", preset=None, steps=steps, settings=saved["config"], run=run)
    same_metrics(tmp_path / "a", tmp_path / "b")
    same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("CartPole-v1", {}),
        ("CartPole-v1", {"vectorization": "sync", "sticky": 0.5, "skip_without_signal": False}),
        ("CartPole-v1", {"collect": "episodes", "min_steps": 100, "advantage": "outcome", "group_size": 2}),
        ("CartPole-v1", {"beta": 0.01, "reference": "periodic", "reference_every": 2, "lr_schedule": "adaptive"}),
        ("Pendulum-v1", {"vectorization": "async"}),
        ("Pendulum-v1", {"baseline_memory": 1000, "baseline_level": True, "log_std_min": -0.51}),
        ("Pendulum-v1", {"reuse": 3, "baseline_memory": 600}),
        ("Pendulum-v1", {"baseline_pull": 0.3, "baseline_cosine": True}),
        ("CartPole-v1", {"reuse": 2}),
        ("CartPole-v1", {"gamma": 0.9, "gamma_final": 0.99}),
        ("LunarLander-v3", {}),
        ("HalfCheetah-v5", {"n_steps": 32}),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(
    tmp_path: Path, env: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grouprl.envs.sticky.FADED_AT", 1.0)  # actions are repeated until the end
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file in the current folder
    steps = 1200 if env == "HalfCheetah-v5" else 3000
    run = {"checkpoint_every": 400 if env == "HalfCheetah-v5" else 700, "eval_every": 600}
    small_run(tmp_path / "whole", env, steps, settings=settings, run=run)
    small_run(tmp_path / "cut", env, steps, settings=settings, run=run)
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert len(checkpoints) >= 3
    for later in checkpoints[2:]:  # as if the run had been killed after its second checkpoint
        later.unlink()
    (tmp_path / "cut" / "model.safetensors").unlink()
    training.resume(tmp_path / "cut")
    same_metrics(tmp_path / "whole", tmp_path / "cut")
    same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_run_with_an_estimator_of_ones_own_is_resumed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_estimators.py").write_text(
        "from grouprl import objective\n"
        "def mine(rewards, lengths, group, terminated):\n"
        "    return objective.standardise(objective.returns_to_go(rewards, lengths, 0.9) - 1.0)\n"
    )
    settings = {"advantage_function": "my_estimators:mine", "collect": "episodes", "min_steps": 100}
    run = {"checkpoint_every": 300, "eval_every": 600}
    small_run(tmp_path / "whole", "CartPole-v1", 1500, settings=settings, run=run)
    small_run(tmp_path / "cut", "CartPole-v1", 1500, settings=settings, run=run)
    assert yaml.safe_load((tmp_path / "cut/config.yaml").read_text())["functions"] == {
        "advantage_function": "my_estimators:mine"
    }
    for later in sorted((tmp_path / "cut" / "checkpoints").iterdir())[2:]:
        later.unlink()
    (tmp_path / "cut" / "model.safetensors").unlink()
    training.resume(tmp_path / "cut")
    same_metrics(tmp_path / "whole", tmp_path / "cut")
    same_weights(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(UsageError, match=r"module 'my_estimators' .* has no 'yours'; it has: mine"):
        small_run(tmp_path / "other", settings={"advantage_function": "my_estimators:yours"})
    with pytest.raises(UsageError, match="give its name as text, module:function"):
        small_run(tmp_path / "other", settings={"advantage_function": lambda r, n, g: r})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_saves_and_its_resumed_run_is_exact(tmp_path: Path, number: signal.Signals) -> None:
    settings = [f"--set={key}={value}" for key, value in ENV_SETTINGS.items()]
    run = ["--set=eval_every=1000", "--set=eval_episodes=2", "--set=final_episodes=2", "--no-video", "--track=none"]
    command = [
        sys.executable,
        "-m",
        "grouprl",
        "train",
        "CartPole-v1",
        "--preset=default",
        "--seed=3",
        "--steps=30000",
        *settings,
        *run,
    ]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "cut")], stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "cut" / "metrics.csv"
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"grouprl resume {tmp_path / 'cut'}" in output
    assert not (tmp_path / "cut" / "summary.json").exists()
    training.resume(tmp_path / "cut")
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    same_metrics(tmp_path / "whole", tmp_path / "cut")
    same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_far_from_the_last_reset_starts_fresh_and_stays_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grouprl.envs.loop.RESTART_AFTER", 0.1)
    run = {"checkpoint_every": 700}
    small_run(tmp_path / "whole", run=run)
    small_run(tmp_path / "cut", run=run)
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert not any(key == "collector.actions" for key in load_state(checkpoints[1])[0])
    for later in checkpoints[2:]:
        later.unlink()
    training.resume(tmp_path / "cut")
    same_metrics(tmp_path / "whole", tmp_path / "cut")
    same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_run(tmp_path / "whole")
    small_run(tmp_path / "cut")
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    for later in checkpoints[3:]:
        later.unlink()
    checkpoints[2].write_bytes(checkpoints[2].read_bytes()[:1000])
    training.resume(tmp_path / "cut")
    assert f"{checkpoints[2].name} cannot be used, an older checkpoint may do" in caplog.text
    assert f"{checkpoints[2].name} is a safetensors file that is cut short or damaged" in caplog.text
    same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_says_so_and_can_be_made_longer(tmp_path: Path) -> None:
    small_run(tmp_path / "run", steps=1500)
    with pytest.raises(UsageError, match="--steps"):
        training.resume(tmp_path / "run")
    result = training.resume(tmp_path / "run", steps=2500)
    assert result.agent.num_timesteps >= 2500
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]["total_timesteps"] == 2500


@pytest.mark.parametrize("other", ["nothing", "compiled code", "torch threads"])
def test_a_run_that_goes_on_where_numbers_are_computed_in_another_way_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    small_run(tmp_path / "run", steps=1000)
    threads = torch.get_num_threads()
    try:
        if other == "torch threads":
            torch.set_num_threads(threads + 1)
        elif other == "compiled code":
            monkeypatch.setattr("grouprl.envs.adam.kernels", SimpleNamespace(available=False))
        training.resume(tmp_path / "run", steps=1500)
    finally:
        torch.set_num_threads(threads)
    said = {
        "compiled code": "compiled code is not in use (was in use)",
        "torch threads": f"torch threads is {threads + 1} (was {threads})",
    }
    if other == "nothing":
        assert "numbers will differ" not in caplog.text
    else:
        assert f"numbers will differ from those of a run that never stopped: {said[other]}" in caplog.text


@pytest.mark.parametrize("where", ["evaluate", "plot_run", "write_summary"])
def test_a_run_killed_after_its_last_update_is_finished_by_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    small_run(tmp_path / "whole", steps=1500)
    place = {
        "evaluate": "grouprl.envs.recorder.evaluate",
        "plot_run": "grouprl.runs.plots.plot_run",
        "write_summary": "grouprl.runs.RunFolder.write_summary",
    }[where]

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, killed)
        with pytest.raises(KeyboardInterrupt):
            small_run(tmp_path / "cut", steps=1500)
    assert not (tmp_path / "cut" / "summary.json").exists()
    result = training.resume(tmp_path / "cut")
    assert result.finished
    assert (tmp_path / "cut" / "curve.png").exists()
    same_metrics(tmp_path / "whole", tmp_path / "cut")
    same_weights(tmp_path / "whole", tmp_path / "cut")
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    assert one["eval"] == other["eval"]
    with pytest.raises(UsageError, match="has done all of its 1500 steps"):
        training.resume(tmp_path / "cut")


def test_a_longer_run_that_is_killed_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tmp_path / "run", steps=1500)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grouprl.envs.recorder.evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            training.resume(tmp_path / "run", steps=2000)
    assert training.resume(tmp_path / "run").summary["total_steps"] >= 2000  # type: ignore[index]


def test_a_run_that_goes_on_in_another_thread_is_left_alone(tmp_path: Path) -> None:
    refused: list[Exception] = []

    def meanwhile(*_: Any) -> None:
        for attempt in (
            lambda: training.resume(tmp_path / "run"),
            lambda: small_run(tmp_path / "run", overwrite=True),
        ):
            try:
                attempt()
            except UsageError as error:
                refused.append(error)

    def announce(_: Any) -> None:
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join()

    small_run(tmp_path / "run", steps=600, announce=announce)
    assert [str(error).split(". ")[0] for error in refused] == [
        f"{tmp_path / 'run'} is in use by another thread of this process"
    ] * 2


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Once an update has come so far, `act`, before anything of it is written."""
    original, done = recorder.Recorder.__call__, []

    def heard(self: recorder.Recorder, agent: GRPO, metrics: Any) -> bool:
        if agent.num_timesteps >= step and not done:
            done.append(act())
        return original(self, agent, metrics)

    monkeypatch.setattr(recorder.Recorder, "__call__", heard)


def test_metrics_that_are_deleted_under_a_run_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_run(tmp_path / "whole", steps=1500)
    at_step(monkeypatch, 1000, lambda: (tmp_path / "run" / "metrics.csv").unlink())
    small_run(tmp_path / "run", steps=1500)
    same_metrics(tmp_path / "whole", tmp_path / "run")
    assert "metrics.csv was deleted, moved or replaced while this run is writing it" in caplog.text


@pytest.mark.parametrize("moment", ["training", "finishing"])
def test_a_run_folder_that_is_deleted_or_moved_under_a_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "run"
    if moment == "training":
        at_step(monkeypatch, 1000, lambda: out.rename(tmp_path / "moved"))
    else:
        evaluate = recorder.evaluate

        def moved(*args: Any, **kwargs: Any) -> Any:
            while out.exists():  # the curve may be written meanwhile
                shutil.rmtree(out, ignore_errors=True)
            return evaluate(*args, **kwargs)

        monkeypatch.setattr(recorder, "evaluate", moved)
    with pytest.raises(TrainingError, match="was deleted, moved or replaced by another since this run began"):
        small_run(out, steps=1500)
    assert not out.exists()


def test_checkpoints_that_are_deleted_under_a_run_are_missed_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    at_step(monkeypatch, 1000, lambda: shutil.rmtree(checkpoints))
    small_run(tmp_path / "run", steps=1500)
    assert "was deleted or moved since this run wrote it" in caplog.text
    assert list(checkpoints.iterdir())


def test_a_run_folder_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    small_run(tmp_path / "run", steps=600)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="already holds a run"):
        small_run(tmp_path / "run", steps=600)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_usage_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="group_size"):
        training.train("CartPole-v1", tmp_path / "run", settings={"group_size": 1})
    with pytest.raises(UsageError, match="eval_evry"):
        training.train("CartPole-v1", tmp_path / "run", run={"eval_evry": 1})
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_fails_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    import gymnasium as gym
    from gymnasium.envs.classic_control import CartPoleEnv

    class Breaks(CartPoleEnv):  # type: ignore[misc]
        steps_taken = 0

        def step(self, action: Any) -> Any:
            Breaks.steps_taken += 1
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, float("nan") if Breaks.steps_taken > 2500 else reward, terminated, truncated, info

    gym.register("Breaks-v0", entry_point=lambda **kwargs: Breaks(**kwargs), max_episode_steps=100)
    try:
        with pytest.raises(TrainingError, match=r"reward nan .*the last good checkpoint is .*step_\d+"):
            small_run(tmp_path / "run", "Breaks-v0", run={"eval_every": 10**9})
    finally:
        del gym.registry["Breaks-v0"]
    checkpoint = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    tensors, _ = load_state(checkpoint)
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
    assert list((tmp_path / "run").rglob("*.tmp*")) == []


def test_a_run_whose_configuration_was_changed_by_hand_is_not_resumed_as_if_that_counted(tmp_path: Path) -> None:
    small_run(tmp_path / "run", steps=1500)
    path = tmp_path / "run" / "config.yaml"
    text = path.read_text()
    values = yaml.safe_load(text)
    values["config"]["learning_rate"] = "1e-9"  # as YAML reads what people write
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=r"learning_rate=1e-09 \(the checkpoint: 0.001\).*grouprl train --config"):
        training.resume(tmp_path / "run", steps=2000)
    path.write_text(yaml.safe_dump({**yaml.safe_load(text), "functions": {"advantage_function": "nowhere_at_all:one"}}))
    with pytest.raises(UsageError, match="no module 'nowhere_at_all'"):
        training.resume(tmp_path / "run", steps=2000)
    values["config"]["learning_rate"] = "1e-3"
    path.write_text(yaml.safe_dump(values))
    assert training.resume(tmp_path / "run", steps=2000).finished


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("run", 3, "run is 3, and must be a mapping"),
        ("config", 3, "config is 3, and must be a mapping"),
        ("seed", [1], r"seed is \[1\], and must be a whole number"),
        ("begun_at", None, "begun_at is None, and must be a whole number"),
    ],
)
def test_what_is_no_configuration_is_named(tmp_path: Path, name: str, value: Any, said: str) -> None:
    small_run(tmp_path / "run", steps=600)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), name: value}))
    with pytest.raises(DamagedFileError, match=said):
        training.resume(tmp_path / "run", steps=900)

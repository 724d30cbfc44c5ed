"""Statistics that a wrapper of the environment keeps are in no file, and that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from grouprl import GRPO
from grouprl.envs import training
from grouprl.envs.callbacks import Run
from grouprl.envs.running_statistics import running_statistics
from grouprl.envs.vector import make_vector

SMALL: dict[str, Any] = {
    "preset": None, "n_envs": 2, "collect": "segments", "n_steps": 32, "epochs": 1, "warmup_steps": 0,
    "skip_without_signal": False,
}  # fmt: skip
QUIET: dict[str, Any] = {"eval_every": 10**6, "final_episodes": 2, "track": ("none",), "video": False}


class Statistics:
    """As Gymnasium's RunningMeanStd."""

    mean = 0.0


class Normalised(gym.Wrapper[Any, Any, Any, Any]):
    """As NormalizeObservation, in what is seen from outside."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.obs_rms = Statistics()


class Scaled(gym.Wrapper[Any, Any, Any, Any]):
    """As NormalizeReward."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.return_rms = Statistics()


class Around(gym.vector.VectorWrapper):
    """As the NormalizeObservation of vector environments."""

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.obs_rms = Statistics()


def plain() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1")


def normalised() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(Normalised(plain()), 50)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_statistics_are_found_within_an_environment(how: str) -> None:
    for make, said in (
        (plain, None),
        (normalised, "observations (obs_rms)"),
        (lambda: Scaled(normalised()), "observations (obs_rms) and rewards (return_rms)"),
        (lambda: Scaled(plain()), "rewards (return_rms)"),
    ):
        venv = make_vector(make, 2, how)
        found = running_statistics(venv)
        venv.close()
        assert found is None if said is None else f"running statistics of {said}, which" in str(found)


def test_statistics_are_found_around_a_vector_environment() -> None:
    venv = gym.vector.SyncVectorEnv([plain])
    assert running_statistics(venv) is None
    assert running_statistics(gym.make_vec("CartPole-v1", 2)) is None
    assert "(obs_rms)" in str(running_statistics(gym.wrappers.vector.RecordEpisodeStatistics(Around(venv))))


def test_wrappers_of_gymnasium_itself_are_known() -> None:
    pytest.importorskip("array_api_compat")  # which these wrappers need
    env = gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(plain()))
    assert "(obs_rms) and rewards (return_rms)" in str(running_statistics(gym.vector.SyncVectorEnv([lambda: env])))


def test_a_run_and_a_checkpoint_say_what_they_do_not_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    GRPO(plain, **SMALL).learn(100, callback=Run(tmp_path / "plain", **QUIET))
    training.resume(tmp_path / "plain", steps=200, env=plain, progress_bar=False)
    assert "running statistics" not in caplog.text
    agent = GRPO(normalised, **SMALL)
    agent.learn(100, callback=Run(tmp_path / "r", **QUIET))
    assert caplog.text.count("evaluations, and this run if it is resumed, will show the policy other numbers") == 1
    assert "Leave it out: grouprl normalises observations by itself" in caplog.text
    caplog.clear()
    agent.checkpoint(tmp_path / "c.safetensors")
    GRPO.from_checkpoint(tmp_path / "c.safetensors", normalised)
    assert caplog.text.count("numbers will differ from those of a run that never stopped: a wrapper") == 1
    caplog.clear()
    training.resume(tmp_path / "r", steps=200, env=normalised, progress_bar=False)
    assert caplog.text.count("running statistics of observations") == 1

"""Real runs on environments, each made ill in one way: the doctor names it. test_signs.py has the other ways."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest

from busy_core import shared_core
from grouprl import GRPO
from grouprl.cli.common import app
from grouprl.doctor import Table, examine, examine_table
from grouprl.envs import training
from grouprl.runs import MetricsLog, RunFolder
from own_process import in_a_process_of_its_own

SMALL: dict[str, Any] = {
    "n_envs": 4, "collect": "segments", "n_steps": 64, "minibatch_size": 64, "epochs": 2, "warmup_steps": 64,
    "lr_schedule": "constant", "threads": 1,
}  # fmt: skip
QUIET: dict[str, Any] = {
    "eval_every": 1000, "eval_episodes": 2, "final_episodes": 2, "video": False, "track": ("none",),
    "checkpoint_every": 10**9,
}  # fmt: skip


class Coin(gym.Env[Any, Any]):
    """Reward 1 for another action than the last one: chance gets half of it, and whoever decides gets none."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.before = 0, 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = -1.0 if action == 2 else float(action != self.before)
        self.before = int(action) if action < 2 else self.before
        self.t += 1
        return np.zeros(1, np.float32), reward, False, self.t == 20, {}


class Endless(Coin):
    """No episode ends."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), float(action), False, False, {}


class Even(Coin):
    """Reward 1 whatever is done: its threshold is reached without any learning."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 1.0, False, super().step(action)[3], {}


class Leaking(Coin):
    """Keeps what it should drop: 2 MB an episode, of new memory, whatever other tests have freed."""

    kept: ClassVar[list[Any]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.kept.append(mmap.mmap(-1, 2 << 20))
        self.kept[-1].write(b"1" * (2 << 20))
        return super().reset(seed=seed)


class Narrow(gym.Env[Any, Any]):
    """The nearer to 0 the better, to one digit: nothing is left to gain once a policy is narrow, and much to lose."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.zeros(1, np.float32), -round(float(abs(action[0])), 1), False, self.t == 16, {}


for name, made in {"Coin": Coin, "Leaking": Leaking, "Narrow": Narrow}.items():
    if f"{name}OfTheDoctor-v0" not in gym.registry:
        gym.register(f"{name}OfTheDoctor-v0", made)  # type: ignore[arg-type]
if "EvenOfTheDoctor-v0" not in gym.registry:
    gym.register("EvenOfTheDoctor-v0", Even, reward_threshold=19.0)  # type: ignore[arg-type]


def names(path: Path, env: str, steps: int, run: dict[str, Any] | None = None, **settings: Any) -> set[str]:
    training.train(
        env, path, preset=None, steps=steps, seed=0, settings=SMALL | settings, run=QUIET | (run or {}),
        progress_bar=False,
    )  # fmt: skip
    return {one.name for one in examine(path) if one.ill}


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "no-signal": ("MountainCar-v0", 5000, {}),
    "reward-flat": ("CartPole-v1", 10_000, {"learning_rate": 1e-8, "collect": "episodes", "min_steps": 200}),
    "learning-rate-below-precision": ("CartPole-v1", 4000, {"learning_rate": 1e-10}),
    "kl-spike": ("CartPole-v1", 6000, {"learning_rate": 0.3, "epochs": 4}),
    "all-clipped": ("CartPole-v1", 2000, {"learning_rate": 0.003, "epochs": 20, "epsilon": 1e-4, "n_steps": 16}),
    "learning-rate-on-its-floor": (
        "CartPole-v1",
        5000,
        {"n_steps": 32, "lr_schedule": "adaptive", "kl_target": 1e-6, "epochs": 8},
    ),
    "memory-grows": ("LeakingOfTheDoctor-v0", 6000, {}),
    "std-collapsed": (
        "NarrowOfTheDoctor-v0",
        12_000,
        {"log_std_init": 2.0, "n_steps": 32, "learning_rate": 0.02, "epochs": 20, "entropy_coef": 0.0},
    ),
    "entropy-gone": ("CartPole-v1", 6000, {"learning_rate": 0.1, "epochs": 4, "entropy_coef": 0.0}),
}


@pytest.mark.parametrize("illness", CASES)
def test_a_run_made_ill_is_found_to_be_ill_in_that_way(illness: str, tmp_path: Path) -> None:
    env, steps, settings = CASES[illness]
    if illness == "memory-grows":  # by a share of what the process holds
        found = in_a_process_of_its_own(tmp_path, names, tmp_path / "r", env, steps, **settings)
    else:
        found = names(tmp_path / "r", env, steps, **settings)
    assert illness in found


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts how long a thread waits")
def test_a_run_beside_others_on_its_core_is_told_that_the_machine_is_busy(tmp_path: Path) -> None:
    with shared_core():
        names(tmp_path / "r", "CartPole-v1", 4000)
    said = {one.name: one for one in examine(tmp_path / "r")}
    assert not said["machine-busy"].ill
    assert "waited for a processor in" in said["machine-busy"].finding


def test_an_environment_without_an_end_is_named() -> None:
    rows: list[dict[str, float]] = []
    settings = SMALL | {"n_steps": 1024, "minibatch_size": 4096, "epochs": 1}
    agent = GRPO(Endless, preset=None, seed=0, **settings)
    agent.learn(51_000, callback=lambda _, metrics: rows.append(dict(metrics)))  # a run would evaluate it for long
    columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in rows[-1]}
    assert "no-episode-ends" in {one.name for one in examine_table(Table(columns, settings), language_model=False)}
    fewer = {name: values[:-1] for name, values in columns.items()}
    assert "no-episode-ends" not in {one.name for one in examine_table(Table(fewer, settings), language_model=False)}


def test_a_policy_that_must_not_decide_is_evaluated_far_below_training(tmp_path: Path) -> None:
    run = {"eval_every": 256, "eval_episodes": 10}
    settings = {"learning_rate": 3e-3, "entropy_coef": 0.05, "epochs": 4, "sticky": 0.0}
    assert "evaluation-below-training" in names(tmp_path / "r", "CoinOfTheDoctor-v0", 12_000, run, **settings)


@pytest.mark.parametrize("advantage", ["baseline", "outcome"])
def test_a_reward_that_is_always_the_same_is_no_success(
    advantage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {} if advantage == "baseline" else {"collect": "episodes", "min_steps": 200}
    assert "no-signal" in names(tmp_path / "r", "EvenOfTheDoctor-v0", 5000, advantage=advantage, **settings)
    (said,) = [record.message for record in caplog.records if record.message.startswith("doctor, no-signal:")]
    assert "no parameter has moved since the run began" in said


def test_the_command_says_it_in_words_in_json_and_in_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    names(tmp_path / "ill", "MountainCar-v0", 5000)
    said = [record.message for record in caplog.records if "doctor" in record.message]
    assert len(said) == 1  # while it ran
    assert "no-signal" in said[0]
    assert "sticky" in said[0]
    well = RunFolder.create(tmp_path / "well", {"env_id": "Some-v0", "config": {}})
    with MetricsLog(well.metrics_path) as log:
        for i in range(40):
            log.append({"step": 100 * i, "return_batch": float(i), "return_mean": float(i)})
    capsys.readouterr()
    assert app(["doctor", str(tmp_path / "ill")], standalone_mode=False) == 1
    assert "no-signal" in capsys.readouterr().out
    assert app(["doctor", str(tmp_path / "ill"), "--json"], standalone_mode=False) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is False
    assert found["diagnoses"][0]["name"] == "no-signal"
    assert not app(["doctor", str(tmp_path / "well"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["healthy"] is True

"""What somebody changes in the config.yaml of a run holds, or is refused with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

from command_line import call
from grouprl import GRPO, UsageError
from grouprl.envs import training
from grouprl.envs.callbacks import Run
from grouprl.errors import DamagedFileError

SMALL: dict[str, Any] = {
    "n_envs": 4, "collect": "segments", "n_steps": 32, "minibatch_size": 64, "epochs": 1, "warmup_steps": 0,
    "skip_without_signal": False, "vectorization": "sync",
}  # fmt: skip
QUIET: dict[str, Any] = {
    "eval_every": 10**6, "final_episodes": 4, "track": ("none",), "video": False,
}  # fmt: skip


class Lasts(gym.Env[Any, Any]):
    """Episodes of ``length`` steps with reward 1 each."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int = 9, bound: float = 1.0) -> None:
        self.length, self.bound = length, bound

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.zeros(2, np.float32), 1.0, self.t == self.length, False, {}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    for name in ("Lasts-v0", "Lasts-v1"):
        gym.register(name, entry_point=Lasts)
    yield
    for name in ("Lasts-v0", "Lasts-v1"):
        del gym.registry[name]


def begun(folder: Path, **env_kwargs: Any) -> Path:
    """A run of 200 steps in ``folder``; returns its config.yaml."""
    training.train(
        "Lasts-v0", folder, preset=None, steps=200, settings=SMALL, env_kwargs=env_kwargs, run=QUIET, progress_bar=False
    )
    return folder / "config.yaml"


def edit(path: Path, **values: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"env_id": "Lasts-v1"}, r"env_id='Lasts-v1' \(the checkpoint: 'Lasts-v0'\).*training.resume\(.*env=..."),
        ({"env_kwargs": {"length": 6}}, r"env_kwargs=\{'length': 6\} \(the checkpoint: .*env_kwargs=..."),
        ({"seed": 8}, r"the seed at the top=8 \(the checkpoint: 0\).*put them back, or start a new run"),
    ],
)  # fmt: skip
def test_another_environment_or_seed_is_refused_where_a_run_goes_on(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    path = begun(tmp_path / "r", length=5)
    before = path.read_text()
    edit(path, **values)
    with pytest.raises(UsageError, match=said):
        training.resume(tmp_path / "r", steps=400, progress_bar=False)
    path.write_text(before)
    assert training.resume(tmp_path / "r", steps=400, progress_bar=False).finished


def test_a_run_goes_on_in_the_environment_that_is_given_and_config_yaml_says_so(tmp_path: Path) -> None:
    path = begun(tmp_path / "r", length=5)

    def lasted(steps: int, **given: Any) -> float:
        result = training.resume(tmp_path / "r", steps=steps, progress_bar=False, **given)
        assert result.summary is not None
        return float(result.summary["eval"]["mean_length"])

    assert lasted(400, env_kwargs={"length": 7}) == 7.0
    assert yaml.safe_load(path.read_text())["env_kwargs"] == {"length": 7}
    assert lasted(600) == 7.0
    assert lasted(800, env="Lasts-v1") == 9.0
    assert lasted(1000) == 9.0
    config = yaml.safe_load(path.read_text())
    assert (config["env_id"], config["env_kwargs"]) == ("Lasts-v1", {})


def test_arguments_that_compare_in_odd_ways_are_no_edit(tmp_path: Path) -> None:
    begun(tmp_path / "r", length=5, bound=float("nan"))
    assert training.resume(tmp_path / "r", steps=400, progress_bar=False).finished


def test_a_threshold_that_is_edited_holds(tmp_path: Path) -> None:
    path = begun(tmp_path / "r")
    run = yaml.safe_load(path.read_text())["run"]
    edit(path, reward_threshold=3.0, run={**run, "eval_every": 100})
    result = training.resume(tmp_path / "r", steps=400, progress_bar=False)
    assert result.summary is not None
    assert result.summary["reward_threshold"] == 3.0
    assert result.summary["solved_at_steps"] > 200
    edit(path, reward_threshold="high")
    with pytest.raises(DamagedFileError, match="reward_threshold is 'high', and must be a number, or null for none"):
        training.resume(tmp_path / "r", steps=600, progress_bar=False)


def test_two_seeds_in_one_file_are_refused_unless_the_command_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begun(tmp_path / "r")
    edit(path, seed=5)
    again = ("train", "--config", path, "--quiet", "--out")
    assert call(*again, tmp_path / "a") == 2
    assert "two seeds: seed=5 at the top and seed=0 under config" in " ".join(capsys.readouterr().err.split())
    for folder, said, seed in (("b", ("--seed", "3"), 3), ("c", ("--set", "seed=4"), 4)):
        assert call(*again, tmp_path / folder, *said) == 0
        assert yaml.safe_load((tmp_path / folder / "config.yaml").read_text())["seed"] == seed
    edit(path, config=yaml.safe_load(path.read_text())["config"] | {"seed": 5})
    assert call(*again, tmp_path / "d") == 0
    assert yaml.safe_load((tmp_path / "d" / "config.yaml").read_text())["config"]["seed"] == 5


def test_a_run_that_began_from_weights_is_not_done_again_from_random_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = GRPO("Lasts-v0", preset=None, **SMALL).learn(200)
    agent.learn(200, callback=Run(tmp_path / "r", **QUIET))
    path = tmp_path / "r" / "config.yaml"
    assert call("train", "--config", path, "--quiet", "--out", tmp_path / "a") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"after its {agent.num_timesteps - 256} steps" in said
    assert "resume" in said
    assert "GRPO.load(MODEL)" in said
    assert not (tmp_path / "a").exists()
    config = yaml.safe_load(path.read_text())
    del config["begun_at"]
    path.write_text(yaml.safe_dump(config))
    assert call("train", "--config", path, "--quiet", "--out", tmp_path / "a") == 0

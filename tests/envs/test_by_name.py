"""An environment of one's own by name: `module:Class`, without registering it."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium as gym
import pytest

from grouprl.envs import training
from grouprl.envs.evaluation import evaluate
from grouprl.envs.grpo import GRPO
from grouprl.envs.vector import find_spec
from grouprl.errors import UsageError

SHOP = """
import gymnasium as gym
import numpy as np
from gymnasium import spaces

class Counter{n}(gym.Env):
    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length=5):
        self.length = length

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {{}}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), float(action), self.t >= self.length, False, {{}}
"""
RUN = {"video": False, "final_episodes": 2, "eval_episodes": 1, "track": ("none",)}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module in the current directory, with one environment class, ``Counter`` and a number."""
    n = abs(hash(request.node.name)) % 10**8
    tmp_path.joinpath(f"shop{n}.py").write_text(SHOP.format(n=n))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return f"shop{n}:Counter{n}"


def test_a_class_of_a_file_here_trains_resumes_and_is_evaluated_with_its_arguments(module: str, tmp_path: Path) -> None:
    settings = {"warmup_steps": 0, "min_steps": 128, "n_envs": 4}
    result = training.train(
        module, tmp_path / "run", steps=200, env_kwargs={"length": 3}, settings=settings, run=RUN, progress_bar=False
    )
    assert result.summary is not None
    assert result.summary["eval"]["mean_length"] == 3
    again = training.resume(tmp_path / "run", steps=400, progress_bar=False)
    assert again.summary is not None
    assert again.summary["total_steps"] >= 400
    assert evaluate(GRPO.load(tmp_path / "run"), episodes=2).lengths == [3, 3]


def test_a_registered_id_goes_before_a_class_of_that_name(module: str) -> None:
    name = module.partition(":")[2]
    gym.register(name, entry_point="gymnasium.envs.classic_control:CartPoleEnv")
    assert find_spec(module).entry_point == "gymnasium.envs.classic_control:CartPoleEnv"


def test_what_is_not_there_is_named_with_where_it_was_looked_for(module: str, tmp_path: Path) -> None:
    (tmp_path / "somewhere.py").write_text("")
    for name in ("somewhere", "somewhere.py"):
        with pytest.raises(UsageError, match=f"'{name}' is a file here; name the class .*: somewhere:MyEnv"):
            GRPO(name)
    with pytest.raises(UsageError, match="registers no environment 'Missing' and has no class of that name"):
        find_spec(f"{module.partition(':')[0]}:Missing")
    with pytest.raises(UsageError, match=rf"looked for in {tmp_path} and among the installed packages"):
        find_spec("no_such_module_here:Env")


def test_a_checkpoint_in_the_place_of_the_model_of_a_run_is_named(module: str, tmp_path: Path) -> None:
    training.train(
        module, tmp_path / "run", steps=200, settings={"warmup_steps": 0, "min_steps": 128, "n_envs": 4},
        run={**RUN, "checkpoint_every": 100}, progress_bar=False,
    )  # fmt: skip
    first, *_ = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert GRPO.load(first).policy is not None
    (tmp_path / "run" / "model.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(UsageError, match=r"model.safetensors holds a checkpoint, and not .* newest good checkpoint of"):
        GRPO.load(tmp_path / "run")

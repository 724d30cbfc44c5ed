"""The key of a service that an environment is given reaches no file of its run, and is asked for to make it again."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from grouprl.envs import training
from grouprl.envs.grpo import GRPO
from grouprl.errors import UsageError

KEY = "correct-horse-battery"
GIVEN: list[Any] = []


class Service(gym.Env):
    """Needs a key."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, api_key: str, eos_token: str = "") -> None:
        GIVEN.append((api_key, eos_token))
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return np.zeros(2, np.float32), float(action), self.steps >= 5, False, {}


def test_a_run_holds_no_secret_and_reads_it_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gym.register("Service-v0", lambda **kwargs: Service(**kwargs))
    monkeypatch.delenv("GROUPRL_API_KEY", raising=False)
    out = tmp_path / "run"
    settings = {"n_envs": 2, "collect": "segments", "n_steps": 16, "epochs": 1, "warmup_steps": 0}
    training.train(
        "Service-v0", out, preset="default", steps=64, settings=settings, progress_bar=False,
        env_kwargs={"api_key": KEY, "eos_token": "</s>"},
        run={"video": False, "eval_episodes": 1, "final_episodes": 1, "track": ("tensorboard",)},
    )  # fmt: skip
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    for again in (lambda: GRPO.load(out), lambda: training.resume(out, steps=128, progress_bar=False)):
        with pytest.raises(UsageError, match=r"^env_kwargs\.api_key was a secret, .*; set GROUPRL_API_KEY in"):
            again()
    monkeypatch.setenv("GROUPRL_API_KEY", KEY)
    GIVEN.clear()
    training.resume(out, steps=128, progress_bar=False)
    assert set(GIVEN) == {(KEY, "</s>")}

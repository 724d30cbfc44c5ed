"""An environment that cannot be closed costs nothing that was done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from grouprl import GRPO, TrainingError, UsageError, evaluate
from grouprl.bench.episodes import play
from grouprl.envs import training
from grouprl.envs.callbacks import Evaluations, Run
from grouprl.envs.watch import make_rendering

SMALL: dict[str, Any] = {"preset": None, "n_envs": 2, "collect": "segments", "n_steps": 32, "warmup_steps": 0}
QUIET: dict[str, Any] = {"eval_episodes": 2, "final_episodes": 2, "track": ("none",), "video": False}
SAID = "the environment {} could not be closed: RuntimeError: the window is gone"


class Stuck(gym.Env[Any, Any]):
    """Five steps with reward 1 each; cannot be closed."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    breaks = False

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = "other"

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.breaks:
            raise ValueError("no such thing")
        self.t += 1
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), 1.0, self.t == 5, False, {}

    def close(self) -> None:
        raise RuntimeError("the window is gone")


class Breaks(Stuck):
    breaks = True


class StuckTogether(SyncVectorEnv):
    def __init__(self) -> None:
        super().__init__([Stuck, Stuck])

    def close_extras(self, **kwargs: Any) -> None:
        raise RuntimeError("the window is gone")


def test_what_was_learned_and_counted_is_kept(tmp_path: Path) -> None:
    agent = GRPO(Stuck, **SMALL)
    with pytest.warns(RuntimeWarning, match=SAID.format("Stuck")):
        assert evaluate(agent, episodes=3).returns == [5.0] * 3
    seen, run = Evaluations(64, episodes=2), Run(tmp_path / "own", **QUIET)
    with pytest.warns(RuntimeWarning, match=SAID.format("Stuck")):
        agent.learn(128, callback=[seen, run])
    assert seen.best_return == 5.0
    assert run.result is not None
    assert run.result.finished
    with pytest.warns(RuntimeWarning, match=SAID.format("Stuck")):
        agent.close()


def test_a_run_of_an_id_ends_with_its_result(tmp_path: Path) -> None:
    gym.register("Stuck-v0", entry_point=Stuck)
    try:
        with pytest.warns(RuntimeWarning, match=SAID.format("Stuck-v0")):
            run = training.train("Stuck-v0", tmp_path / "run", preset=None, steps=64, run=QUIET, progress_bar=False)
        assert run.finished
        with pytest.warns(RuntimeWarning, match=SAID.format("Stuck-v0")):
            assert play(lambda seen: np.zeros(len(seen), int), "Stuck-v0", episodes=2, seed=0) == [5.0, 5.0]
        with pytest.warns(RuntimeWarning), pytest.raises(UsageError, match="does not support render_mode='human'"):
            make_rendering(GRPO("Stuck-v0", **SMALL), "human")
    finally:
        del gym.registry["Stuck-v0"]


def test_environments_beside_one_that_cannot_be_closed_are_closed() -> None:
    closed: list[int] = []

    class Other(Stuck):
        def close(self) -> None:
            closed.append(1)
            super().close()

    with pytest.warns(RuntimeWarning, match=SAID.format("Other")):
        GRPO(Other, **SMALL).close()
    assert len(closed) == 2


def test_workers_end_where_their_environments_cannot_be_closed() -> None:
    with pytest.warns(RuntimeWarning, match=SAID.format("Stuck")):
        agent = GRPO(Stuck, **SMALL, vectorization="async")
    assert agent.learn(64).num_timesteps == 64
    agent.close()


def test_a_vector_environment_that_cannot_be_closed_is_named() -> None:
    agent = GRPO(StuckTogether(), preset=None, warmup_steps=0)
    with pytest.warns(RuntimeWarning, match=SAID.format("StuckTogether")):
        agent.close()
    assert agent.get_env() is None


def test_the_error_that_was_under_way_stays() -> None:
    agent = GRPO(Stuck, **SMALL)
    with pytest.warns(RuntimeWarning), pytest.raises(TrainingError, match="no such thing"):
        evaluate(agent, Breaks, episodes=1)
    with pytest.warns(RuntimeWarning), pytest.raises(TrainingError, match="no such thing"):
        agent.learn(64, callback=Evaluations(32, episodes=1, env=Breaks))

"""Trainings on environments that a process does alone, and two do together; run as a program in each of the two."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from grouprl import GRPO
from grouprl.envs import training
from grouprl.errors import GrouprlError, TrainingError
from grouprl.machine.ranks import Ranks, here, join


class Walk(gym.Env[Any, Any]):
    """Observes its place and names its valid actions; episodes of unequal length."""

    action_space = spaces.Discrete(3)
    observation_space = spaces.Dict(
        {"place": spaces.Box(-9, 9, (2,), np.float32), "action_mask": spaces.MultiBinary(3)}
    )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.left = self.np_random.normal(size=2), int(self.np_random.integers(3, 9))
        return self._seen(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place[action % 2] += self.np_random.normal() + (action == 2)
        self.left -= 1
        return self._seen(), float(-abs(self.place).sum()), self.left <= 0, False, {}

    def _seen(self) -> dict[str, Any]:
        mask = np.array([1, self.left % 2, 1], np.int8)
        return {"place": np.clip(self.place, -9, 9).astype(np.float32), "action_mask": mask}


class Masked(Walk):
    """Names its valid actions in info, and some of the time only."""

    observation_space = spaces.Box(-9, 9, (2,), np.float32)

    def _seen(self) -> Any:
        return np.clip(self.place, -9, 9).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        observation, _ = super().reset(seed=seed)
        return observation, {"action_mask": np.array([1, 1, 0], np.int8)}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        out = super().step(action)
        return (*out[:4], {"action_mask": np.array([1, 0, 1], np.int8)} if self.left % 2 else {})


class Failing(Walk):
    """Fails after some steps on the second process."""

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if here().rank == 1 and self.np_random.random() < 0.1:
            raise ValueError("the wheel came off")
        return super().step(action)


class Hanging(Walk):
    """Does not come back after some steps on the second process."""

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if here().rank == 1 and self.np_random.random() < 0.1:
            time.sleep(1000)
        return super().step(action)


BRIEF = {"min_steps": 64, "warmup_steps": 20, "n_envs": 5, "minibatch_size": 64, "epochs": 2, "seed": 3, "preset": None}
SAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "masks in the observation": (Walk, {}),
    "masks in the info": (Masked, {"advantage": "baseline"}),
    "vectorised": ("CartPole-v1", {}),
    "workers": (Walk, {"vectorization": "async", "n_envs": 4}),
    "groups": (Walk, {"group_size": 4, "n_envs": 8, "advantage": "outcome"}),
    "earlier batches": (Masked, {"advantage": "baseline", "reuse": 3, "baseline_memory": 640, "baseline_level": True}),
    "earlier batches of continuous actions": ("Pendulum-v1", {"reuse": 2, "log_std_min": -0.51, "n_envs": 3}),
    "gradients shared out": (
        Walk,
        {"min_steps": 8192, "max_steps": 8192, "n_envs": 32, "minibatch_size": 8192, "epochs": 1, "threads": 2},
    ),
}
"""Environments, and settings of agents that learn the same on one process and on two."""


def run(name: str) -> dict[str, Any]:
    """What one of `SAME` gave."""
    env, settings = SAME[name]
    agent = GRPO(env, **(BRIEF | settings))
    metrics: list[dict[str, float]] = []
    steps = 8192 if "gradients" in name else 400
    agent.learn(steps, callback=lambda agent, row: metrics.append(dict(row)))
    weights = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    agent.close()
    wall = ("time_", "train_seconds", "steps_per_second")
    return {"weights": weights, "metrics": [{k: v for k, v in m.items() if not k.startswith(wall)} for m in metrics]}


def stop_on_last(agent: GRPO, metrics: dict[str, float]) -> bool:
    """Stop after the first update, on the second process alone."""
    return here().rank == 0


FAILING: dict[str, Callable[[], Any]] = {
    "environment": lambda: GRPO(Failing, **BRIEF).learn(5000),
    "hanging": lambda: GRPO(Hanging, **BRIEF, env_timeout=0.5).learn(5000),
    "setting": lambda: GRPO(Walk, **{**BRIEF, "seed": here().rank}).learn(500),
    "one environment": lambda: GRPO(Walk(), **BRIEF),
    "too few": lambda: GRPO(Walk, **{**BRIEF, "n_envs": 1}),
}


def between_hosts() -> dict[str, Any]:
    """What the processes exchange where they run on several hosts, by torch.distributed alone."""
    ranks = Ranks(here(), join().group)
    found: dict[str, Any] = {
        "gathered": [x.tolist() for x in ranks.gather(np.full(ranks.rank + 1, ranks.rank))],
        "any": ranks.agree(ranks.first),
    }
    try:
        with ranks.telling():
            if not ranks.first:
                raise ValueError("the wheel came off")
            ranks.wait()
    except (TrainingError, ValueError) as error:
        found["error"] = str(error)
    return found


def main(out: Path) -> None:
    """Do all of it as one of two processes, and write what came of it."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: run(name) for name in SAME}
    for name, fails in FAILING.items():
        try:
            fails()
            found[f"error {name}"] = "nothing was raised"
        except GrouprlError as error:
            found[f"error {name}"] = f"{type(error).__name__}: {error}"
    stopped = GRPO(Walk, **BRIEF).learn(5000, callback=stop_on_last)
    found["stopped at"] = stopped.num_timesteps
    found["between hosts"] = between_hosts()
    found["run"] = the_run(out / "run", 1500)
    found["on"] = the_run(out / "alone", 4000, resume=True)
    torch.save(found, out / f"rank{here().rank}.pt")


def the_run(folder: Path, steps: int, *, resume: bool = False) -> dict[str, torch.Tensor]:
    """The weights at the end of a run with a folder."""
    if resume:
        result = training.resume(folder, steps=steps, progress_bar=False)
    else:
        how = {"track": ("none",), "video": False, "eval_episodes": 2, "final_episodes": 2, "eval_every": 500,
               "checkpoint_every": 500}  # fmt: skip
        result = training.train(
            "Pendulum-v1", folder, preset=None, steps=steps, run=how, progress_bar=False,
            settings={"n_envs": 2, "min_steps": 100, "epochs": 1, "seed": 1, "reuse": 3, "baseline_memory": 1000},
        )  # fmt: skip
    return {name: value.clone() for name, value in result.agent.policy.state_dict().items()}


def last(out: Path, folder: Path) -> None:
    """The last link of a chain, as one of two processes."""
    torch.set_num_threads(1)
    torch.save(the_run(folder, 4000, resume=True), out / f"rank{here().rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else last(Path(sys.argv[1]), Path(sys.argv[2]))

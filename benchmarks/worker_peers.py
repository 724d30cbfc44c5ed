"""A method of another library as a worker of `grouprl bench`: the file names it and the cell is read.

    worker: .venv-peers/bin/python benchmarks/worker_peers.py ppo [--or-defaults | --defaults]

PPO and A2C of Stable-Baselines3, ARS and TRPO of sb3-contrib, and SBX's PPO as sbx-ppo, with RL-Zoo's settings where
zoo_ppo.py or zoo_others.py have them for the environment, and the settings of the method on top. Where they have none
this is an error, or with --or-defaults the library's own defaults, and the row says which. With --defaults RL-Zoo's are
not asked. What SBX compiles to act and to learn, it compiles while the clock of training runs. Rewards at evaluation
are raw and statistics of normalisation frozen, and episodes are played by the same function, from the same starts, as
those of every other method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # this library beside the others
sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks.pixels

import sbx_ppo
import zoo_others
import zoo_ppo
from grouprl.bench.clock import TrainingClock
from grouprl.bench.episodes import play
from grouprl.bench.noise import noisy
from grouprl.bench.worker import returns_of, tell, versions

SBX = "sbx-ppo"
LIBRARIES = {SBX: ("sbx-rl", "jax"), "ars": ("sb3-contrib",), "trpo": ("sb3-contrib",)}
"""What a method needs besides Stable-Baselines3, by its name."""


def algorithm(name: str) -> Callable[..., BaseAlgorithm]:
    """What makes the model from a policy's name, environments and Stable-Baselines3's arguments."""
    if name == SBX:
        return sbx_ppo.make
    if name in ("ppo", "a2c"):
        import stable_baselines3 as library
    else:
        import sb3_contrib as library
    found: type[BaseAlgorithm] = getattr(library, name.upper())
    return found


def value_of(setting: Any) -> Any:
    """RL-Zoo's ``lin_x``: from x to 0 over the run; its name of an activation; anything else as it is."""
    if isinstance(setting, dict) and "activation_fn" in setting:
        return {**setting, "activation_fn": getattr(torch.nn, setting["activation_fn"])}
    if not (isinstance(setting, str) and setting.startswith("lin_")):
        return setting
    first = float(setting.removeprefix("lin_"))
    schedule: Callable[[float], float] = lambda remaining: remaining * first  # noqa: E731
    return schedule


def tuned(name: str, subject: str, or_defaults: bool) -> dict[str, Any]:
    """RL-Zoo's settings. Raises ValueError if there are none, and the library's defaults will not do."""
    table = zoo_ppo.SETTINGS if name in ("ppo", SBX) else zoo_others.SETTINGS[name]
    if subject not in table and or_defaults:
        return {}
    if subject not in table:
        raise ValueError(f"there are no settings of RL-Zoo for {name} on {subject}; there are for {', '.join(table)}")
    return dict(table[subject])


class Points(BaseCallback):
    """Evaluates greedily so many times in a run, between two updates; the clock of training stands still meanwhile."""

    def __init__(self, run: Run, every: int) -> None:
        super().__init__()
        self.run, self.every, self.due = run, every, every

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.due:
            self.due = self.num_timesteps - self.num_timesteps % self.every + self.every
            self.run.point(self.num_timesteps)


class Run:
    """A model with its environments, what its evaluations have found, and how long they took."""

    def __init__(self, name: str, cell: dict[str, Any], zoo: dict[str, Any]) -> None:
        self.settings_of = "RL-Zoo" if zoo else "the library's defaults"
        given = {**zoo, **cell["settings"]}
        settings = {key: value_of(value) for key, value in given.items()}
        n_envs, normalize = settings.pop("n_envs", 1), settings.pop("normalize", False)
        policy = settings.pop("policy", "MlpPolicy")
        self.cell = cell
        noise = noisy(cell["reward_noise"], cell["seed"]) if cell["reward_noise"] else None
        environment = {"env_kwargs": cell["env_kwargs"], "wrapper_class": noise}
        self.venv: Any = make_vec_env(cell["env_id"], n_envs, seed=cell["seed"], **environment)
        self.normalized = bool(normalize)
        if normalize:
            options = normalize if isinstance(normalize, dict) else {}
            self.venv = VecNormalize(self.venv, gamma=settings.get("gamma", 0.99), **options)
        device = {"device": "cpu"}
        self.model = algorithm(name)(policy, self.venv, seed=cell["seed"], **device, **settings)
        self.clock = TrainingClock()

    def play(self, episodes: int, starts: int, deterministic: bool) -> list[float]:
        """Raw returns of complete episodes."""

        def act(observations: Any) -> Any:
            shown = self.venv.normalize_obs(observations) if self.normalized else observations
            return self.model.predict(shown, deterministic=deterministic)[0]

        return play(act, self.cell["env_id"], self.cell["env_kwargs"], episodes=episodes, seed=starts)

    def point(self, step: int) -> None:
        """Report a point of the curve."""
        spent = {"seconds": self.clock.seconds, "cpu_seconds": self.clock.cpu_seconds}
        with self.clock.paused():
            state = np.random.get_state(), torch.get_rng_state()
            greedy = float(np.mean(self.play(self.cell["point_episodes"], self.cell["curve_starts"], True)))
            np.random.set_state(state[0])
            torch.set_rng_state(state[1])
        tell({"point": {"step": step, **spent, "greedy": greedy}})


def main() -> None:
    """Train for the steps of the cell, then play greedily and sampled."""
    name, cell = sys.argv[1], json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    try:
        given = {} if "--defaults" in sys.argv else tuned(name, cell["subject"], "--or-defaults" in sys.argv)
        run = Run(name, cell, given)
        run.point(0)
        run.clock = TrainingClock()
        run.model.learn(cell["steps"], callback=Points(run, max(1, cell["steps"] // cell["points"])))
        spent = {"train_seconds": run.clock.seconds, "train_cpu_seconds": run.clock.cpu_seconds}
        greedy, sampled = (run.play(cell["episodes"], cell["final_starts"], how) for how in (True, False))
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"})
        raise
    policy = run.model.policy
    packages = ["stable-baselines3", "torch", "numpy", "gymnasium"]
    tell({
        "result": {
            "steps_done": run.model.num_timesteps, **spent, "settings_of": run.settings_of,
            "greedy": returns_of(greedy), "sampled": returns_of(sampled),
            "parameters": sbx_ppo.parameters(policy) if name == SBX else sum(p.numel() for p in policy.parameters()),
            "versions": versions(*packages, *LIBRARIES.get(name, ())),
        }
    })  # fmt: skip


if __name__ == "__main__":
    main()

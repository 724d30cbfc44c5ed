"""One measurement of Stable-Baselines3's or SBX's (its JAX twin's) PPO in a fresh process; run by envs_speed.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

import measuring


def linear(first: float) -> Callable[[float], float]:
    """RL-Zoo's ``lin_``: from ``first`` to 0 over the run."""
    return lambda remaining: remaining * first


# RL-Zoo's PPO settings for CartPole-v1 (its hyperparams/ppo.yml); the rest is SB3's default (64x64 tanh, Adam).
ZOO = {
    "n_steps": 32,
    "batch_size": 256,
    "n_epochs": 20,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "ent_coef": 0.0,
    "learning_rate": linear(0.001),
    "clip_range": linear(0.2),
}
ZOO_ENVS, ZOO_BUDGET = 8, 100_000


class AfterUpdate(BaseCallback):
    """Calls ``notice`` after every update; stops once it returns True."""

    def __init__(self, notice: Callable[[BaseAlgorithm], bool]) -> None:
        super().__init__()
        self.notice, self.updates, self.finished = notice, 0, False
        self.iteration_seconds: list[float] = []
        self._resumed = 0.0

    def _look(self) -> None:
        if self._resumed:
            self.iteration_seconds.append(time.perf_counter() - self._resumed)
            self.updates += 1
            self.finished = self.finished or self.notice(self.model)
        self._resumed = time.perf_counter()

    def _on_rollout_start(self) -> None:  # the update before this rollout is complete
        self._look()

    def _on_training_end(self) -> None:
        if not self.finished:
            self._look()

    def _on_step(self) -> bool:
        return not self.finished


def build(library: str, n_envs: int, seed: int, settings: dict[str, object]) -> BaseAlgorithm:
    if library == "sbx":
        from sbx import PPO
    else:
        from stable_baselines3 import PPO
    venv = make_vec_env(measuring.ENV_ID, n_envs, seed=seed, vec_env_cls=DummyVecEnv)
    model: BaseAlgorithm = PPO("MlpPolicy", venv, seed=seed, device="cpu", **settings)
    return model


def throughput(library: str, n_envs: int | None, updates: int, seed: int) -> dict[str, object]:
    if n_envs is None:
        n_envs, settings = ZOO_ENVS, dict(ZOO)
    else:  # equal work: 128 steps, 4 epochs of 4 minibatches
        settings = {"n_steps": 128, "batch_size": n_envs * 128 // 4, "n_epochs": 4, "learning_rate": linear(1e-3)}
    model = build(library, n_envs, seed, settings)
    clock = measuring.StepClock()

    def notice(model: BaseAlgorithm) -> bool:
        clock.stamp(model.num_timesteps)
        return len(clock.stamps) == updates

    model.learn(updates * n_envs * int(str(settings["n_steps"])), callback=AfterUpdate(notice))
    return dict(clock.result())


def solve(library: str, seed: int, launched: float) -> dict[str, object]:
    model = build(library, ZOO_ENVS, seed, dict(ZOO))
    clock = measuring.SolveClock(launched)

    def notice(model: BaseAlgorithm) -> bool:
        return clock.check(
            model.num_timesteps,
            lambda observation: model.predict(observation, deterministic=True)[0],
            lambda: [episode["r"] for episode in model.ep_info_buffer or []],
        )

    watch = AfterUpdate(notice)
    model.learn(ZOO_BUDGET, callback=watch)
    result = {"hits": clock.hits, "setup_seconds": clock.setup_seconds, "budget": ZOO_BUDGET}
    if library == "sbx":  # it compiles in its first iterations; what those took beyond the usual is compilation
        usual = statistics.median(watch.iteration_seconds)
        result["compile_seconds"] = sum(max(0.0, seconds - usual) for seconds in watch.iteration_seconds[:3])
        result["compile_in_clock"] = True
    return result


def main() -> None:
    arguments = measuring.worker_arguments()
    torch.set_num_threads(arguments["threads"])
    library = arguments["library"]
    if arguments["mode"] == "throughput":
        result = throughput(library, arguments.get("n_envs"), arguments["updates"], arguments["seed"])
    else:
        result = solve(library, arguments["seed"], arguments["launched"])
    packages = ["stable-baselines3", "torch", "numpy", "gymnasium"] + (["sbx-rl", "jax"] if library == "sbx" else [])
    measuring.report({**result, "versions": measuring.versions(*packages)})


if __name__ == "__main__":
    main()

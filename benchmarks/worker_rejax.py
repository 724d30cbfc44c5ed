"""One measurement of rejax's PPO (environment and learner one compiled JAX program) in a fresh process."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rejax import PPO

import measuring

# rejax's own PPO settings for CartPole-v1 (configs/gymnax/cartpole.yaml); 64x64 is its default network.
PUBLISHED = {
    "num_envs": 5,
    "num_steps": 100,
    "num_epochs": 5,
    "num_minibatches": 5,
    "learning_rate": 7.5e-4,
    "max_grad_norm": 0.5,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_eps": 0.2,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
}
# The quickest to the greedy criterion of seven variants tried on three seeds (5 to 32 environments, constant and
# falling learning rates).
NO_ENTROPY_BONUS = PUBLISHED | {"ent_coef": 0.0}
EQUAL_WORK = NO_ENTROPY_BONUS | {"num_steps": 128, "num_epochs": 4, "num_minibatches": 4, "learning_rate": 1e-3}
BUDGET = 200_000

traced: list[tuple[jax.Array, jax.Array]] = []


class RecordingPPO(PPO):
    """PPO that lets the compiled iteration return the rewards and ends of the steps it took."""

    def collect_trajectories(self, ts: Any) -> Any:
        ts, trajectories = super().collect_trajectories(ts)
        traced.append((trajectories.reward, trajectories.done))
        return ts, trajectories


def compile_iteration(settings: dict[str, Any], seed: int) -> tuple[Any, Any, Any, float]:
    """The algorithm, its first state, one training iteration as a compiled program, and the seconds compiling took."""
    began = time.perf_counter()
    algorithm = RecordingPPO.create(env=measuring.ENV_ID, agent_kwargs={"activation": "tanh"}, **settings)

    def iterate(state: Any) -> Any:
        state = algorithm.train_iteration(state)
        return state, *traced.pop()

    state = jax.block_until_ready(jax.jit(algorithm.init_state)(jax.random.PRNGKey(seed)))
    iteration = jax.jit(iterate).lower(state).compile()
    return algorithm, state, iteration, time.perf_counter() - began


def throughput(settings: dict[str, Any], updates: int, seed: int) -> dict[str, Any]:
    _, state, iteration, seconds = compile_iteration(settings, seed)
    clock = measuring.StepClock()
    for update in range(updates):
        state, *_ = jax.block_until_ready(iteration(state))
        clock.stamp((update + 1) * settings["num_envs"] * settings["num_steps"])
    return {**clock.result(), "compile_seconds": seconds}


class Episodes:
    """Returns of finished episodes, from the rewards and ends [T, n] of one batch after another."""

    def __init__(self, n: int) -> None:
        self.running = np.zeros(n)
        self.returns: list[float] = []

    def add(self, rewards: np.ndarray, done: np.ndarray) -> list[float]:
        for reward, end in zip(rewards, done.astype(bool), strict=True):
            self.running += reward
            self.returns.extend(self.running[end].tolist())
            self.running[end] = 0.0
        return self.returns


def solve(settings: dict[str, Any], seed: int, launched: float) -> dict[str, Any]:
    algorithm, state, iteration, seconds = compile_iteration(settings, seed)

    @jax.jit
    def greedy(params: Any, observation: Any) -> Any:
        return jnp.argmax(algorithm.actor.apply(params, observation, method="_action_dist").logits, -1)

    episodes = Episodes(settings["num_envs"])
    clock = measuring.SolveClock(launched)
    per_update = settings["num_envs"] * settings["num_steps"]
    for steps in range(per_update, BUDGET + per_update, per_update):
        state, rewards, done = jax.block_until_ready(iteration(state))
        params = state.actor_ts.params
        finished = clock.check(
            steps,
            lambda observation, params=params: greedy(params, observation),
            lambda rewards=rewards, done=done: episodes.add(np.asarray(rewards), np.asarray(done)),
        )
        if finished:
            break
    result = {"hits": clock.hits, "setup_seconds": clock.setup_seconds, "budget": BUDGET}
    return result | {"compile_seconds": seconds, "compile_in_clock": False}


def main() -> None:
    arguments = measuring.worker_arguments()
    if arguments["mode"] == "throughput":
        settings = EQUAL_WORK | {"num_envs": arguments["n_envs"]} if arguments.get("n_envs") else PUBLISHED
        result = throughput(settings, arguments["updates"], arguments["seed"])
    else:
        settings = {"published": PUBLISHED, "no_entropy_bonus": NO_ENTROPY_BONUS}[arguments["settings"]]
        result = solve(settings, arguments["seed"], arguments["launched"])
    measuring.report({**result, "versions": measuring.versions("rejax", "gymnax", "jax", "flax", "numpy")})


if __name__ == "__main__":
    main()

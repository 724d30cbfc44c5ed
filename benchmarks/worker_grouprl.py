"""One measurement of grouprl in a fresh process; run by envs_speed.py in the project's environment."""

from __future__ import annotations

from torch import nn

import measuring
from grouprl import GRPO
from grouprl.envs import presets

N_STEPS = 128
EQUAL_WORK = {
    "collect": "segments",
    "n_steps": N_STEPS,
    "epochs": 4,
    "learning_rate": 1e-3,
    "lr_schedule": "linear",
    "sticky": 0.0,
    "skip_without_signal": False,  # every batch is learned from
    "warmup_steps": 256,
}


def own_network(inputs: int, outputs: int) -> nn.Module:
    """The default architecture as a user would write it: ordinary torch modules."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def throughput(n_envs: int, updates: int, seed: int, plain: bool) -> dict[str, object]:
    agent = GRPO(
        measuring.ENV_ID,
        preset=None,
        network=own_network if plain else None,
        seed=seed,
        n_envs=n_envs,
        minibatch_size=n_envs * N_STEPS // 4,
        **EQUAL_WORK,
    )
    clock = measuring.StepClock()
    parts = dict.fromkeys(("time_collect", "time_advantages", "time_update"), 0.0)

    def after_update(agent: GRPO, metrics: dict[str, float]) -> bool:
        assert metrics["optimizer_steps"] == 16, "equal work is 4 epochs of 4 minibatches"
        clock.stamp(agent.num_timesteps)
        if len(clock.stamps) > clock.burn_in:
            for name in parts:
                parts[name] += metrics[name]
        return len(clock.stamps) < updates

    agent.learn((updates + 1) * n_envs * N_STEPS, callback=after_update)
    return {**clock.result(), **parts, "threads": agent.config.threads}


def solve(seed: int, launched: float) -> dict[str, object]:
    agent = GRPO(measuring.ENV_ID, preset="auto", seed=seed)
    chosen = presets.resolve(measuring.ENV_ID, "auto")
    assert chosen is not None, f"there is no preset for {measuring.ENV_ID}"
    clock = measuring.SolveClock(launched)

    def after_update(agent: GRPO, metrics: dict[str, float]) -> bool:
        return not clock.check(
            agent.num_timesteps,
            lambda observation: agent.predict(observation, deterministic=True)[0],
            lambda: list(agent.recent_returns),
        )

    agent.learn(chosen.total_timesteps, callback=after_update)
    return {
        "hits": clock.hits,
        "setup_seconds": clock.setup_seconds,
        "train_seconds": agent.train_seconds,
        "steps": agent.num_timesteps,
        "budget": chosen.total_timesteps,
    }


def main() -> None:
    arguments = measuring.worker_arguments()
    if arguments["mode"] == "throughput":
        result = throughput(
            arguments["n_envs"], arguments["updates"], arguments["seed"], plain=arguments.get("plain", False)
        )
    else:
        result = solve(arguments["seed"], arguments["launched"])
    measuring.report({**result, "versions": measuring.versions("grouprl", "torch", "numpy", "gymnasium")})


if __name__ == "__main__":
    main()

"""Does noise on the reward hurt? CartPole-v1 with Gaussian noise added to every reward. See README.md, "Noise".

python benchmarks/envs_noise.py          # measure, write results/envs_noise.{json,md}
python benchmarks/envs_noise.py --table  # only render the table again
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import measuring
import zoo_ppo

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "envs_noise.json"
SIGMAS = (0.0, 0.5, 1.0, 2.0, 4.0)
STEPS = 100_000
EPISODES = 100
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
PPO = "Stable-Baselines3's PPO (RL-Zoo's settings)"
ESTIMATORS: dict[str, dict[str, Any]] = {
    "closed-form baseline (preset CartPole-v1)": {"preset": "CartPole-v1"},
    "closed-form baseline (the robust default)": {"preset": None},
    "outcome of groups of 8 (preset chapter)": {"preset": "formula"},
    "time-step group, batch of 32 episodes": {"preset": "formula", "advantage": "timestep"}
    | {"group_size": None, "gamma": 0.99, "beta": 0.0},
}


class NoisyReward(gym.vector.VectorRewardWrapper):
    """Adds N(0, sigma^2) to the reward of every real step; steps that only reset stay at 0."""

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any], sigma: float, seed: int) -> None:
        super().__init__(env)
        self.sigma, self.rng = sigma, np.random.default_rng(seed)

    def rewards(self, reward: Any) -> Any:
        return reward + self.sigma * self.rng.standard_normal(len(reward)).astype(np.float32) * (reward != 0)


def run(settings: dict[str, Any], sigma: float, seed: int) -> float:
    """Mean greedy return, without noise, over 100 episodes after training with it."""
    from grouprl import GRPO, evaluate

    groups = settings["preset"] == "formula" and settings.get("group_size", 8) is not None
    mode = "sync" if groups else "vector_entry_point"  # groups need a seed per environment
    venv = NoisyReward(gym.make_vec("CartPole-v1", num_envs=32, vectorization_mode=mode), sigma, seed)
    agent = GRPO(venv, seed=seed, **settings).learn(STEPS)
    return evaluate(agent, "CartPole-v1", episodes=EPISODES).summary()["mean_return"]


def run_ppo(peers: Path, sigma: float, seed: int) -> float:
    """The same by Stable-Baselines3's PPO, in a process of its own."""
    given = {"env_id": "CartPole-v1", "env_kwargs": {}, "seed": seed, "budget": STEPS, "episodes": EPISODES}
    given |= {"settings": zoo_ppo.SETTINGS["CartPole-v1"], "sigma": sigma}
    mean: float = measuring.run_worker([peers, HERE / "worker_ppo.py"], given)["mean"]
    return mean


def table(data: dict[str, Any]) -> str:
    """Rows: estimators; columns: noise; cells: mean over seeds and the worst seed."""
    head = "| estimator | " + " | ".join(f"sigma {s:g}" for s in data["sigmas"]) + " |"
    lines = [head, "|" + " --- |" * (len(data["sigmas"]) + 1)]
    for name, row in data["returns"].items():
        cells = [f"{np.mean(values):.0f} (worst {min(values):.0f})" for values in row]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = (
        f"\nMean greedy return without noise over 100 episodes, after {data['steps']:,} steps with Gaussian noise of "
        f"that standard deviation on every reward (the reward itself is 1); mean over seeds {data['seeds']}, worst "
        "seed in brackets.\n"
    )
    return "\n".join(lines) + "\n" + note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--peers", type=Path, default=PEERS_PYTHON, help="interpreter of the peers' environment")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        if not arguments.peers.exists():
            parser.error(f"there is no {arguments.peers}; make it as README.md says, or name another with --peers")
        seeds = [int(s) for s in arguments.seeds.split(",")]
        returns: dict[str, list[list[float]]] = {}
        rows: dict[str, Callable[[float, int], float]] = {
            name: partial(run, settings) for name, settings in ESTIMATORS.items()
        }
        rows[PPO] = partial(run_ppo, arguments.peers)
        for name, of in rows.items():
            returns[name] = [[of(sigma, seed) for seed in seeds] for sigma in SIGMAS]
            print(name, [round(float(np.mean(values))) for values in returns[name]], flush=True)
        data = {"sigmas": SIGMAS, "steps": STEPS, "seeds": seeds, "returns": returns}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()

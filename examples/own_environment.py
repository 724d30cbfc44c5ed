"""Train on an environment of your own: grouprl needs only a callable that makes it.

python examples/own_environment.py
python examples/own_environment.py --out runs/thermostat   # and leave a run folder, as grouprl train does
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from grouprl import GRPO, evaluate
from grouprl.envs.callbacks import Run, StopAtReturn


class Thermostat(gym.Env[np.ndarray, int]):
    """Keep a leaky room at 20 degrees, with the heater off, at half or at full.

    Observed: inside and outside temperature, both drawn anew for each episode. Reward: minus the distance from 20, at
    most 10. No state ends the episode. After 60 steps it is *truncated*, so
    the rewards that would follow do not count as 0.
    """

    observation_space = spaces.Box(-50.0, 80.0, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)  # seeds self.np_random: draw from nothing else, and runs repeat and resume exactly
        self.outside = float(self.np_random.uniform(-10, 15))
        self.inside = float(self.np_random.uniform(5, 35))
        self.time = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.inside += 2.5 * int(action) + 0.1 * (self.outside - self.inside)
        self.time += 1
        reward = -min(abs(self.inside - 20.0), 10.0)
        return self._observation(), reward, False, self.time >= 60, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.inside, self.outside], np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a new folder for metrics, model, evaluations, curve and report")
    out = parser.parse_args().out
    agent = GRPO(Thermostat, n_envs=16, seed=0)
    before = evaluate(agent, episodes=50).summary()["mean_return"]
    run = [] if out is None else [Run(out, video=False)]
    agent.learn(60_000, callback=[*run, StopAtReturn(-60.0)], progress_bar=True)
    after = evaluate(agent, episodes=50).summary()["mean_return"]
    print(f"mean return of 50 greedy episodes: {before:.1f} before training, {after:.1f} after")


if __name__ == "__main__":
    main()

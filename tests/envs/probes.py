"""Tiny environments whose right answer is known, each isolating one thing a learner can get wrong."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

FAST: dict[str, Any] = {
    "preset": None,
    "n_envs": 8,
    "collect": "segments",
    "n_steps": 32,
    "minibatch_size": 64,
    "epochs": 4,
    "learning_rate": 5e-3,
    "lr_schedule": "constant",
    "hidden_sizes": (16,),
    "baseline_features": 16,
    "warmup_steps": 64,
    "sticky": 0.0,
    "entropy_coef": 0.0,
    "threads": 1,
}
"""Settings under which a probe is solved in a second or two."""

NOTHING = spaces.Box(-1.0, 1.0, (1,), np.float32)


class Probe(gym.Env):
    """Episodes of one step: `observe` draws what is seen, `reward` judges the action taken."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        observe: Callable[[np.random.Generator], Any],
        reward: Callable[[Any, Any], float],
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self._observe, self._reward = observe, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = self._observe(self.np_random)
        return self.seen, {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return self.seen, self._reward(self.seen, action), True, False, {}


def zero(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(1, np.float32)


def bandit(best: int = 2, n: int = 4) -> Probe:
    """One arm of four pays 1."""
    return Probe(NOTHING, spaces.Discrete(n), zero, lambda seen, action: float(action == best))


def contextual() -> Probe:
    """The sign of the one number seen decides which of two arms pays."""
    return Probe(
        NOTHING,
        spaces.Discrete(2),
        lambda rng: np.array([rng.choice([-1.0, 1.0])], np.float32),
        lambda seen, action: float(action == int(seen[0] > 0)),
    )


def constant() -> Probe:
    """Every action pays 1: there is nothing to learn."""
    return Probe(
        NOTHING, spaces.Discrete(3), lambda rng: rng.uniform(-1, 1, 1).astype(np.float32), lambda seen, action: 1.0
    )


def shifted(start: int = 5) -> Probe:
    """Discrete with a start: only the third action of the space pays."""
    return Probe(NOTHING, spaces.Discrete(4, start=start), zero, lambda seen, action: float(action == start + 2))


def target(low: float, high: float, goal: float) -> Probe:
    """A continuous action must reach `goal`; the reward falls with the squared distance in units of the half range."""
    return Probe(
        NOTHING,
        spaces.Box(low, high, (1,), np.float32),
        zero,
        lambda seen, action: -float(((action[0] - goal) / ((high - low) / 2)) ** 2),
    )


def multi_discrete() -> Probe:
    """Each of three choices right is worth a third."""
    goal = np.array([2, 0, 3])
    return Probe(NOTHING, spaces.MultiDiscrete([3, 2, 4]), zero, lambda seen, action: float((action == goal).mean()))


def multi_binary() -> Probe:
    """Each of four switches right is worth a quarter."""
    goal = np.array([1, 0, 0, 1])
    return Probe(NOTHING, spaces.MultiBinary(4), zero, lambda seen, action: float((action == goal).mean()))


def image() -> Probe:
    """32 x 32 x 1: the bright half, left or right, says which action pays."""

    def observe(rng: np.random.Generator) -> np.ndarray:
        picture = np.zeros((32, 32, 1), np.uint8)
        half = int(rng.integers(2))
        picture[:, half * 16 : half * 16 + 16] = 255
        return picture

    return Probe(
        spaces.Box(0, 255, (32, 32, 1), np.uint8),
        spaces.Discrete(2),
        observe,
        lambda seen, action: float(action == int(seen[0, -1, 0] > 0)),
    )


def dictionary() -> Probe:
    """The exclusive or of a Discrete and the sign of a number, in a Dict, says which action pays."""
    space = spaces.Dict({"switch": spaces.Discrete(2), "number": NOTHING})

    def observe(rng: np.random.Generator) -> dict[str, Any]:
        return {"switch": np.int64(rng.integers(2)), "number": np.array([rng.choice([-1.0, 1.0])], np.float32)}

    return Probe(
        space,
        spaces.Discrete(2),
        observe,
        lambda seen, action: float(action == (int(seen["switch"]) ^ int(seen["number"][0] > 0))),
    )


def pair() -> Probe:
    """As `dictionary`, in a Tuple of two numbers."""
    space = spaces.Tuple((NOTHING, spaces.Discrete(2)))

    def observe(rng: np.random.Generator) -> tuple[Any, ...]:
        return (np.array([rng.choice([-1.0, 1.0])], np.float32), np.int64(rng.integers(2)))

    return Probe(
        space,
        spaces.Discrete(2),
        observe,
        lambda seen, action: float(action == (int(seen[1]) ^ int(seen[0][0] > 0))),
    )


class Delayed(gym.Env):
    """Two steps: the second one pays 1 if the *first* action was 1. The second action does nothing."""

    observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.first = None
        return np.zeros(1, np.float32), {}

    def step(self, action):
        if self.first is None:
            self.first = int(action)
            return np.ones(1, np.float32), 0.0, False, False, {}
        return np.zeros(1, np.float32), float(self.first == 1), True, False, {}


class Truncated(gym.Env):
    """Ends by truncation alone, after `length` steps; every step pays 1, less `cost` where the action is 1."""

    observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 10, cost: float = 0.0, shows_time: bool = False) -> None:
        self.length, self.cost, self.shows_time = length, cost, shows_time

    def _seen(self) -> np.ndarray:
        return np.array([self.time / self.length if self.shows_time else 0.5], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._seen(), {}

    def step(self, action):
        self.time += 1
        return self._seen(), 1.0 - self.cost * int(action), False, self.time >= self.length, {}


class Masked(gym.Env):
    """Three steps an episode. The best-paid of three actions is forbidden; of the others action 1 pays.

    `where`: the mask is in "info", or in the observation "dict". Taking the forbidden action raises.
    """

    action_space = spaces.Discrete(3)
    mask = np.array([1, 1, 0], np.int8)

    def __init__(self, where: str = "info") -> None:
        self.where = where
        self.observation_space = (
            NOTHING if where == "info" else spaces.Dict({"x": NOTHING, "action_mask": spaces.MultiBinary(3)})
        )

    def _out(self) -> tuple[Any, dict[str, Any]]:
        x = np.zeros(1, np.float32)
        if self.where == "info":
            return x, {"action_mask": self.mask}
        return {"x": x, "action_mask": self.mask}, {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._out()

    def step(self, action):
        if action == 2:
            raise AssertionError("the forbidden action was taken")
        self.time += 1
        seen, info = self._out()
        return seen, (0.0, 1.0, 10.0)[action], self.time >= 3, False, info

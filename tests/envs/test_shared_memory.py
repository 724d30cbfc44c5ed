"""Arrays that an environment, a network or a function of the user's changes in place: nobody else must see it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from grouprl import GRPO, evaluate

QUICK: dict[str, Any] = {
    "preset": None, "n_envs": 4, "min_steps": 96, "max_steps": 96, "epochs": 2, "warmup_steps": 0,
}  # fmt: skip


class Polite(gym.Env[Any, Any]):
    """Reward for an action near what is seen; 7 steps. Nothing it gives or gets is ever changed."""

    observation_space: Any = spaces.Box(-1, 1, (2,), np.float32)
    action_space: Any = spaces.Box(-1, 1, (1,), np.float32)

    def look(self) -> Any:
        self.x = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.x.copy()

    def masks(self) -> dict[str, Any]:
        if not isinstance(self.action_space, spaces.Discrete):
            return {}
        return {"action_mask": np.array([True, True, self.x[1] > 0])}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.look(), self.masks()

    def step(self, action: Any) -> Any:
        self.time += 1
        reward = -abs(float(np.ravel(action)[0]) - self.x[0])
        return self.look(), reward, self.time >= 7, False, self.masks()


class Rude(Polite):
    """The same, but it uses one array for all observations and one for all masks, and changes the action it gets."""

    def __init__(self) -> None:
        self.buffer, self.mask = np.zeros(2, np.float32), np.zeros(3, bool)

    def look(self) -> Any:
        self.buffer[:] = super().look()
        return self.buffer

    def masks(self) -> dict[str, Any]:
        made = super().masks()
        if made:
            self.mask[:] = made["action_mask"]
            made["action_mask"] = self.mask
        return made

    def step(self, action: Any) -> Any:
        out = super().step(action)
        if isinstance(action, np.ndarray):
            action *= 10
        return out


class Choice(Polite):
    action_space = spaces.Discrete(3)


class RudeChoice(Rude):
    action_space = spaces.Discrete(3)


class Numbers(Polite):
    action_space = spaces.MultiDiscrete([3, 2])


class RudeNumbers(Rude):
    action_space = spaces.MultiDiscrete([3, 2])


def weights(agent: GRPO) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def trained(env: Any, **settings: Any) -> GRPO:
    return GRPO(env, **QUICK | settings).learn(400)


def check_same(first: GRPO, second: GRPO) -> None:
    assert torch.equal(weights(first), weights(second))
    assert first.recent_returns == second.recent_returns


@pytest.mark.parametrize(("polite", "rude"), [(Polite, Rude), (Choice, RudeChoice), (Numbers, RudeNumbers)])
@pytest.mark.parametrize("as_instance", [False, True])
def test_an_environment_that_reuses_its_arrays_teaches_the_same(polite: Any, rude: Any, as_instance: bool) -> None:
    first, second = (trained(make() if as_instance else make) for make in (polite, rude))
    check_same(first, second)
    assert evaluate(first, polite, episodes=3).returns == evaluate(second, rude, episodes=3).returns


class Vector(VectorEnv[Any, Any, Any]):
    """Environments in numpy, in any autoreset mode. ``rude``: every array it gives it uses again, and it scribbles on
    the actions it gets; masks in info.
    """

    def __init__(self, mode: AutoresetMode, rude: bool, n: int = 4) -> None:
        self.num_envs, self.mode, self.rude, self.metadata = n, mode, rude, {"autoreset_mode": mode}
        self.single_observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.single_action_space = spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self.x, self.mask = np.zeros((n, 2), np.float32), np.ones((n, 3), bool)
        self.rewards, self.over, self.cut = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
        self.time, self.rng = np.zeros(n, int), np.random.default_rng(0)

    def give(self, array: Any) -> Any:
        return array if self.rude else array.copy()

    def look(self) -> None:
        self.x[:] = self.rng.uniform(-1, 1, self.x.shape)
        self.mask[:, 2] = self.x[:, 1] > 0

    def info(self) -> dict[str, Any]:
        return {"action_mask": self.give(self.mask), "_action_mask": np.ones(self.num_envs, bool)}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        who = np.ones(self.num_envs, bool)
        if options and "reset_mask" in options:
            who = options["reset_mask"]
        else:
            self.rng = np.random.default_rng(seed)
            self.time[:] = np.arange(self.num_envs)
        self.time[who & (self.time >= 7)] = 0
        self.rewards[who], self.over[who] = -99.0, False
        x, mask = self.x.copy(), self.mask.copy()
        self.look()
        self.x[~who], self.mask[~who] = x[~who], mask[~who]
        return self.give(self.x), self.info()

    def step(self, actions: Any) -> Any:
        starting = self.over.copy() if self.mode is AutoresetMode.NEXT_STEP else np.zeros(self.num_envs, bool)
        self.time += 1
        self.time[starting] = 0
        self.rewards[:] = np.where(starting, 0.0, -np.abs(actions - 1 - self.x[:, 0]))
        self.over[:] = self.time >= 7
        if self.rude:
            actions[:] = 77
        self.look()
        final, info = self.x.copy(), {}
        if self.mode is AutoresetMode.SAME_STEP and self.over.any():
            info = {"final_obs": final, "_final_obs": self.over.copy()}
            self.time[self.over] = 0
            self.look()
        gave = self.give(self.x), self.give(self.rewards), self.give(self.over), self.give(self.cut)
        return *gave, info | self.info()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_vector_environment_that_reuses_its_arrays_teaches_the_same(mode: AutoresetMode) -> None:
    first, second = (trained(Vector(mode, rude)) for rude in (False, True))
    check_same(first, second)
    assert min(first.recent_returns) > -50
    for deterministic in (True, False):
        played = [
            evaluate(a, Vector(mode, r), 6, deterministic=deterministic) for a, r in ((first, False), (second, True))
        ]
        assert played[0].returns == played[1].returns


class InPlace(torch.nn.Module):
    """A layer after the inputs were changed in place; ``polite``: of a copy."""

    def __init__(self, inputs: int, outputs: int, polite: bool) -> None:
        super().__init__()
        self.layer, self.polite = torch.nn.Linear(inputs, outputs), polite

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer((x.clone() if self.polite else x).mul_(3.0))
        return out


@pytest.mark.parametrize("normalize", [True, False])
def test_a_network_may_change_its_inputs_in_place(normalize: bool) -> None:
    settings = {"normalize_observations": normalize}
    first, second = (
        trained(Choice, network=lambda i, o, polite=polite: InPlace(i, o, polite), **settings)
        for polite in (True, False)
    )
    check_same(first, second)
    seen = np.full((3, 2), 0.5, np.float32)
    second.predict(seen, action_masks=np.ones(3, bool))
    assert (seen == 0.5).all()


def test_an_estimator_of_the_users_own_may_change_what_it_gets() -> None:
    def polite(rewards: torch.Tensor, lengths: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        return rewards * 2

    def rude(rewards: torch.Tensor, lengths: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        lengths.zero_()
        group.zero_()
        return rewards.mul_(2)

    first, second = (trained(Choice, advantage_function=f, loss_type="grpo") for f in (polite, rude))
    check_same(first, second)


def test_actions_that_a_resumed_run_repeats_are_those_the_environment_got(tmp_path: Any) -> None:
    agent = trained(Rude, sticky=0.9)
    agent.checkpoint(tmp_path / "c.safetensors")
    agent.learn(300)
    again = GRPO.from_checkpoint(tmp_path / "c.safetensors", Rude).learn(300)
    check_same(agent, again)

"""What a process has set for itself changes no result: gradients, types, errors of NumPy, threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from grouprl import GRPO, evaluate
from grouprl.envs import collect, presets
from grouprl.envs.config import make_config
from grouprl.envs.unread import RULES
from grouprl.settings.unread import without_effect

QUICK: dict[str, Any] = {"preset": None, "n_envs": 4, "min_steps": 64, "max_steps": 64, "epochs": 2, "warmup_steps": 32}


class Masked(gym.Env[Any, Any]):
    """Reward for the sign of what is seen; half of the actions are forbidden."""

    observation_space: Any = spaces.Dict(
        {"x": spaces.Box(-1e30, 1e30, (2,), np.float64), "action_mask": spaces.MultiBinary(4)}
    )
    action_space: Any = spaces.Discrete(4)
    switch: Any = None
    """Called in each step."""

    def look(self) -> Any:
        self.x = self.np_random.uniform(-1, 1, 2)
        return {"x": self.x * [1, 1e-40], "action_mask": np.array([1, 0, 0, 1], np.int8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.look(), {}

    def step(self, action: Any) -> Any:
        if self.switch is not None:
            self.switch()
        reward = float((self.x[0] > 0) == (action == 3))
        self.time += 1
        return self.look(), reward, self.time >= 5, False, {}


class Plain(Masked):
    observation_space: Any = spaces.Box(-1, 1, (2,), np.float32)
    action_space: Any = spaces.Box(-1, 1, (1,), np.float32)

    def look(self) -> Any:
        self.x = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.x

    def step(self, action: Any) -> Any:
        return super().step(3 if action[0] > 0 else 0)


class Many(Plain):
    action_space: Any = spaces.MultiBinary(3)


def own(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def run(env: Any, **settings: Any) -> tuple[torch.Tensor, list[float]]:
    """All weights after some training, and what an evaluation returned."""
    agent = GRPO(env, **QUICK | settings).learn(300)
    played = evaluate(agent, episodes=4).returns
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()]), played


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Any] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients_off": lambda: torch.autograd.set_grad_enabled(False),
    "numpy_raises": lambda: np.errstate(all="raise"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


AGENTS: list[tuple[Any, dict[str, Any]]] = [
    (Plain, {}),
    (Plain, {"native": False, "advantage": "outcome"}),
    (Masked, {"beta": 0.1}),
    (Many, {"kl_stop": 0.1}),
]
OWN: tuple[Any, dict[str, Any]] = (Plain, {"network": own})
CASES = [
    *((*agent, surroundings) for agent in AGENTS for surroundings in SURROUNDINGS),
    *((*OWN, surroundings) for surroundings in SURROUNDINGS if "float" not in surroundings),  # it is of that type then
]


@pytest.mark.parametrize(("env", "settings", "surroundings"), CASES)
def test_surroundings_change_nothing(env: Any, settings: dict[str, Any], surroundings: str) -> None:
    expected = run(env, **settings)
    with SURROUNDINGS[surroundings]():
        found = run(env, **settings)
    assert torch.equal(expected[0], found[0])
    assert expected[1] == found[1]


@pytest.mark.parametrize("network", [None, own])
def test_an_environment_that_switches_gradients_off_is_learned_in(network: Any) -> None:
    class Switches(Plain):
        switch = staticmethod(lambda: torch.set_grad_enabled(False))

    try:
        found = run(Switches, network=network)
    finally:
        torch.set_grad_enabled(True)
    assert torch.equal(found[0], run(Plain, network=network)[0])


def test_an_agent_made_in_inference_mode_trains_outside_of_it_and_the_other_way_round() -> None:
    expected = run(Plain, network=own)[0]
    for inside, outside in ((torch.inference_mode, nullcontext), (nullcontext, torch.inference_mode)):
        with inside():
            agent = GRPO(Plain, network=own, **QUICK)
        with outside():
            agent.learn(300)
        assert torch.equal(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]), expected)


def test_agents_made_in_several_threads_are_those_of_one() -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda seed: GRPO(Plain, network=own, seed=seed, **QUICK), [1, 2, 3, 4] * 4))
    for seed, agent in zip([1, 2, 3, 4] * 4, made, strict=True):
        alone = GRPO(Plain, network=own, seed=seed, **QUICK)
        assert all(torch.equal(a, b) for a, b in zip(agent.policy.parameters(), alone.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"n_steps": 16}, "n_steps=16"),
        ({"advantage": "outcome", "max_steps": 20_000}, "max_steps=20000"),
        ({"collect": "segments", "min_steps": 32}, "min_steps=32"),
        ({"log_std_min": -1.0}, "log_std_min=-1.0"),
        ({"log_std_init": -1.0}, "log_std_init=-1.0"),
        ({"advantage": "outcome", "baseline_level": True}, "baseline_level=True"),
        ({"advantage": "outcome", "baseline_memory": 40_960}, "baseline_memory=40960"),
        ({"advantage": "outcome", "baseline_pull": 0.3}, "baseline_pull=0.3"),
        ({"baseline_pull": 0.3, "baseline_ridge": 0.1}, "baseline_ridge=0.1"),
        ({"baseline_pull": 0.3, "baseline_sweeps": 3}, "baseline_sweeps=3"),
        ({"advantage_function": lambda rewards, lengths, group: rewards, "gae_lambda": 0.9}, "gae_lambda=0.9"),
        (
            {"advantage_function": lambda rewards, lengths, group: rewards, "scale_rewards": "none"},
            "scale_rewards='none'",
        ),
        (
            {
                "advantage_function": lambda rewards, lengths, group: rewards,
                "advantage": "outcome",
                "collect": "episodes",
            },
            "advantage='outcome'",
        ),
        (
            {"surrogate_function": lambda logp, old, advantages: logp, "loss_type": "spo"},
            "loss_type='spo'",
        ),
        ({"scale_rewards": "none"}, "scale_rewards='none'"),
        ({"advantage": "outcome", "gamma": 0.9}, "gamma=0.9"),
        ({"advantage": "leave_one_out", "gamma_final": 0.999}, "gamma_final=0.999"),
        ({"kl_estimator": "k1"}, "kl_estimator='k1'"),
        ({"reference": "old"}, "reference='old'"),
        ({"reference_every": 3}, "reference_every=3"),
        ({"reference_every": 3, "beta": 0.1}, "reference_every=3"),
        ({"lr_max": 0.1, "lr_schedule": "linear"}, "lr_max=0.1"),
        ({"kl_target": 0.1, "lr_schedule": "constant"}, "kl_target=0.1"),
        ({"lr_final": 0.1, "lr_schedule": "constant"}, "lr_final=0.1"),
        ({"epsilon": 0.3, "loss_type": "sapo"}, "epsilon=0.3"),
        ({"epsilon": 0.3, "surrogate_function": lambda logp, old, advantages: logp}, "epsilon=0.3"),
        ({"hidden_sizes": [8], "network": own}, r"hidden_sizes=\(8,\)"),
        ({"warmup_steps": 64, "normalize_observations": False}, "warmup_steps=64"),
        ({"sticky": 0.5, "n_envs": 1}, "sticky=0.5"),
    ],
)
def test_a_setting_without_effect_is_named(settings: dict[str, Any], name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} has no effect"):
        GRPO("CartPole-v1", preset=None, **settings)


def test_a_setting_without_effect_on_an_environment_that_was_given_as_an_object_is_named() -> None:
    for env in (Plain(), gym.make_vec("CartPole-v1", num_envs=2)):
        with pytest.warns(UserWarning, match="vectorization='async' has no effect"):
            GRPO(env, preset=None, vectorization="async")


def test_settings_with_an_effect_are_not_named(recwarn: pytest.WarningsRecorder) -> None:
    GRPO("Pendulum-v1", preset=None, log_std_min=-1.0, baseline_level=True, baseline_memory=40_960, gae_lambda=0.9)
    GRPO(Plain, preset=None, advantage_function=lambda rewards, lengths, group, values: values, baseline_level=True)
    GRPO(Plain, preset=None, advantage_function=lambda rewards, lengths, group: rewards, advantage="outcome")
    GRPO(Plain, preset=None, beta=0.1, reference="periodic", reference_every=3, kl_estimator="k1", hidden_sizes=[8])
    GRPO(Plain, preset=None, lr_final=0.5, lr_max=0.1, kl_target=0.1, epsilon=0.3)
    GRPO(Plain, preset=None, gamma=0.9, gamma_final=0.999, sticky=0.5, n_envs=2, warmup_steps=64, vectorization="sync")
    GRPO(Plain, preset=None, advantage_function=lambda rewards, lengths, group, gamma: rewards, gamma=0.9)
    GRPO(Plain, preset=None, advantage="outcome", scale_rewards="none", lr_schedule="linear", lr_final=0.5)
    GRPO("CartPole-v1", preset="formula", lr_schedule="constant", beta=0.0)  # what the preset ships was not chosen
    assert not [str(one.message) for one in recwarn if "no effect" in str(one.message)]


@pytest.mark.parametrize("name", presets.names())
def test_no_setting_of_a_preset_is_without_effect(name: str) -> None:
    preset = presets.load(name)
    shipped = preset.config
    config = make_config(shipped)
    with closing(gym.make(preset.env_id, **preset.env_kwargs)) as env:
        continuous = isinstance(env.action_space, spaces.Box)
    about = {
        "fits_baseline": config.advantage == "baseline", "continuous": continuous, "own_network": False,
        "own_advantage": False, "own_surrogate": False, "one_object": False, "one_environment": config.n_envs == 1,
    }  # fmt: skip
    assert without_effect(RULES, config, shipped, about) == []


def test_actions_are_remembered_within_a_bound_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "HISTORY_BYTES", 4000)
    agent = GRPO(Plain, **QUICK).learn(200)
    assert agent.loop.collector is not None
    assert not agent.loop.collector.replayable
    assert agent.loop.collector.steps_since_reset == 0

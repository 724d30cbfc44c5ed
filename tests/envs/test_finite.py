"""Numbers that are not finite end training, evaluation and acting where they arise, and say where that was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from grouprl import GRPO, TrainingError, UsageError, evaluate
from grouprl.envs.learner import Learner

QUICK: dict[str, Any] = {"preset": None, "n_envs": 4, "min_steps": 64, "max_steps": 64, "epochs": 2, "warmup_steps": 0}


class Nested(gym.Env[Any, Any]):
    """10 steps; ``where`` says which number is ``bad``, and when: at reset, in mid-episode, with the last one."""

    observation_space: Any = spaces.Dict(
        {
            "a": spaces.Discrete(3),
            "b": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
            "c": spaces.Tuple([spaces.Box(-np.inf, np.inf, (3,), np.float32)]),
        }
    )
    action_space: Any = spaces.Discrete(2)

    def __init__(self, where: str = "nowhere", bad: float = float("nan"), after: int = 0) -> None:
        self.where, self.bad, self.left = where, bad, after

    def look(self, moment: str) -> Any:
        b = self.np_random.uniform(-1, 1, (2, 2))
        if moment == self.where:
            self.left -= 1
            if self.left < 0:
                b[1, 0] = self.bad
        return {"a": 1, "b": b, "c": (np.zeros(3, np.float32),)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.look("reset"), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        over = self.time >= 10
        reward = self.bad if self.where == "reward" and self.time == 5 else float(action)
        return self.look("last" if over else "middle" if self.time == 5 else ""), reward, over, False, {}


def made(where: str, bad: float = float("nan"), **settings: Any) -> GRPO:
    """Four environments, of which the third has a fault."""
    number = iter(range(100))
    return GRPO(lambda: Nested(where if next(number) == 2 else "nowhere", bad), **QUICK | settings)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("where", ["reset", "middle", "last"])
@pytest.mark.parametrize("warmup", [0, 64])
def test_an_observation_is_named_by_environment_key_and_component(where: str, bad: float, warmup: int) -> None:
    agent = made(where, bad, warmup_steps=warmup)
    with pytest.raises(TrainingError, match=r"observation of environment 2 on step \d+ .*component 2 of 'b'"):
        agent.learn(200)
    assert all(bool(torch.isfinite(p).all()) for p in agent.policy.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39, 1e30, -1e30])
@pytest.mark.parametrize("estimator", ["baseline", "maxrl", "outcome", "reinforce_pp_baseline", "batch_returns"])
def test_a_reward_is_named_by_environment_and_step(bad: float, estimator: str) -> None:
    with pytest.raises(TrainingError, match=r"environment 2 returned the reward .* on step \d+ of this batch"):
        made("reward", bad, advantage=estimator).learn(200)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("reset", "observation of environment 0 on step 0 .*'b'"),
        ("middle", "observation of environment 0 on step 5 .*'b'"),
        ("reward", "environment 0 returned the reward nan on step 4 of the episode"),
    ],
)
def test_evaluation_looks_as_well(where: str, message: str) -> None:
    agent = GRPO(Nested, **QUICK)
    with pytest.raises(TrainingError, match=message):
        evaluate(agent, lambda: Nested(where), episodes=4)


def test_acting_looks_as_well() -> None:
    agent = GRPO(Nested, **QUICK)
    seen, _ = Nested("reset").reset(seed=0)
    with pytest.raises(UsageError, match="nan in component 2 of 'b'"):
        agent.predict(seen)
    spoil(agent)
    with pytest.raises(TrainingError, match=r"its parameter network.layers.0.weight is not finite"):
        agent.predict(Nested().reset(seed=0)[0])


def spoil(agent: GRPO) -> None:
    with torch.no_grad():
        next(iter(agent.policy.network.parameters()))[0, 0] = float("nan")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_weights_that_stop_being_finite_between_two_updates_are_named(native: bool, activation: str) -> None:
    agent = GRPO(Nested, native=native, activation=activation, **QUICK)
    with pytest.raises(TrainingError, match=r"on step 0 of this batch; its parameter network.layers.0.weight"):
        agent.learn(500, callback=lambda agent, _: spoil(agent))
    with pytest.raises(TrainingError, match=r"parameter network.layers.0.weight is not finite"):
        evaluate(agent, episodes=2)


def test_statistics_that_stop_being_finite_are_named() -> None:
    def spoil_statistics(agent: GRPO, _: Any) -> None:
        agent.policy.mean[3] = float("nan")
        agent.policy.refresh()

    with pytest.raises(TrainingError, match="the observations' mean is not finite"):
        GRPO(Nested, **QUICK).learn(500, callback=spoil_statistics)


@pytest.mark.parametrize("by", ["save", "checkpoint"])
def test_a_policy_that_is_not_finite_does_not_replace_one_that_was_saved(tmp_path: Path, by: str) -> None:
    agent = GRPO(Nested, **QUICK)
    agent.learn(300)
    path = tmp_path / "agent.safetensors"
    getattr(agent, by)(path)
    good = path.read_bytes()
    spoil(agent)
    with pytest.raises(TrainingError, match=r"cannot be saved: its parameter network.layers.0.weight is not finite"):
        getattr(agent, by)(path)
    assert path.read_bytes() == good


def test_a_network_that_overflows_is_named() -> None:
    class Overflows(torch.nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.layer, self.acted = torch.nn.Linear(inputs, outputs), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.acted += len(x) == 4  # once per step of four environments
            out: torch.Tensor = self.layer(x) / float(self.acted < 10)
            return out

    with pytest.raises(TrainingError, match="it is the network that overflows or divides by 0"):
        GRPO(Nested, network=Overflows, **QUICK).learn(500)


def test_weights_that_a_step_makes_infinite_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = GRPO(Nested, **QUICK).learn(64)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    monkeypatch.setattr(agent.loop.learner.optimizer, "step", lambda: spoil(agent))
    with pytest.raises(TrainingError, match="not finite"):
        agent.learn(64)
    monkeypatch.undo()
    assert all(bool(torch.isfinite(p).all()) for p in agent.policy.parameters()), before
    agent.learn(64)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logp, old, a: logp * float("inf"), "surrogate_function returned a number that is not finite"),
        (lambda logp, old, a: logp * a + float("inf"), "surrogate_function returned a number that is not finite"),
        (lambda logp, old, a: (logp * a).detach(), "not differentiable in logp"),
        (lambda logp, old, a: torch.zeros_like(a), "not differentiable in logp"),
        (lambda logp, old, a: (logp * a).mean(), r"returned shape \[\]"),
        (lambda logp, old, a: logp > old, "must hold real numbers"),
        (lambda logp, old, a: 1.0, "returned float"),
    ],
)
def test_a_surrogate_of_the_users_own_is_checked(function: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        GRPO(Nested, surrogate_function=function, **QUICK).learn(64)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda r, n, g: r / 0.0 * 0.0, "not finite"),
        (lambda r, n, g: r[:-1], "returned shape"),
        (lambda r, n, g: r > 0, "real numbers"),
        (lambda r, n, g: r.tolist(), "returned list"),
    ],
)
def test_an_estimator_of_the_users_own_is_checked(function: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        GRPO(Nested, advantage_function=function, **QUICK).learn(64)


def test_an_estimator_of_the_users_own_may_return_whole_numbers_and_gradients() -> None:
    GRPO(Nested, advantage_function=lambda r, n, g: r.long(), **QUICK).learn(64)
    weight = torch.ones((), requires_grad=True)
    GRPO(Nested, advantage_function=lambda r, n, g: r * weight, **QUICK).learn(64)


def test_the_loss_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = GRPO(Nested, native=False, **QUICK)
    learn = Learner.learn

    def spoiled(self: Learner, rollout: Any, advantages: Any, progress: float) -> Any:
        return learn(self, rollout, torch.where(torch.arange(len(advantages)) == 3, torch.inf, advantages), progress)

    monkeypatch.setattr(Learner, "learn", spoiled)
    with pytest.raises(TrainingError, match="the loss is"):
        agent.learn(64)

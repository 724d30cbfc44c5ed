"""The floor under the standard deviation of continuous actions holds after every gradient step, whoever takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import probes
import pytest
import torch
from torch import nn

from grouprl import GRPO, UsageError
from grouprl.envs.adam import Adam
from grouprl.envs.native import kernels
from grouprl.learning.parameters import TrainedParameters

FALLING = probes.FAST | {"learning_rate": 0.05, "n_envs": 4, "n_steps": 64, "log_std_init": -0.2}
"""Settings with which the noise of one action, which only costs reward, shrinks at once."""


def own_network(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def trained(**settings: Any) -> GRPO:
    return GRPO(lambda: probes.target(-1.0, 1.0, 0.3), **FALLING | settings).learn(1500)


@pytest.mark.parametrize("native", [True, False])
def test_a_step_ends_at_the_floor_of_a_parameter_and_leaves_the_others(native: bool) -> None:
    if native and not kernels.available:
        pytest.skip("there is no C compiler here")
    held, free = nn.Parameter(torch.tensor([0.0, 0.5])), nn.Parameter(torch.tensor([0.0, 0.5]))
    parameters = TrainedParameters(nn.ParameterList([held, free]))
    optimizer = Adam(parameters, 1.0, native=native, floors=[(held, -0.25)])
    parameters.start()
    parameters.add(torch.ones(4))
    optimizer.step()  # the first step of Adam is as long as the learning rate
    assert optimizer.native is native
    torch.testing.assert_close(held.detach(), torch.tensor([-0.25, -0.25]))
    torch.testing.assert_close(free.detach(), torch.tensor([-1.0, -0.5]))


@pytest.mark.parametrize(
    "settings",
    [{}, {"native": False}, {"network": own_network}, {"network": lambda i, o: own_network(i, o).double()}],
    ids=["compiled", "torch", "own network", "own network in float64"],
)
def test_the_noise_of_a_policy_stays_at_its_floor(settings: dict[str, Any]) -> None:
    lowest = []
    agent = GRPO(lambda: probes.target(-1.0, 1.0, 0.3), **FALLING | settings | {"log_std_min": -0.75})
    agent.learn(1500, callback=lambda agent, metrics: lowest.append(float(agent.policy.log_std.detach().min())))
    assert min(lowest) == -0.75 == lowest[-1]
    assert float(trained(**settings).policy.log_std.detach().min()) < -0.85  # without a floor


def test_the_initial_noise_is_at_the_floor_or_above() -> None:
    with pytest.raises(UsageError, match=r"log_std_init=-2\.0 is below its floor, log_std_min=-1\.0; lower"):
        GRPO("Pendulum-v1", log_std_init=-2.0, log_std_min=-1.0)
    agent = GRPO("Pendulum-v1", preset=None, log_std_min=-0.1)  # the default, -0.5, is below
    assert agent.policy.log_std.tolist() == pytest.approx([-0.1])


def test_a_saved_policy_below_the_floor_acts_as_it_was_and_trains_at_the_floor(tmp_path: Any) -> None:
    agent = trained(log_std_init=-2.0)
    agent = GRPO.load(agent.save(tmp_path / "narrow"), log_std_min=-1.0, log_std_init=None)
    assert float(agent.policy.log_std.detach().max()) < -1.5
    agent.set_env(lambda: probes.target(-1.0, 1.0, 0.3))
    seen = []
    agent.learn(200, callback=lambda agent, metrics: seen.append(metrics["policy_std"]))
    assert seen[0] == pytest.approx(np.exp(-1.0))  # of the policy that collected the first batch

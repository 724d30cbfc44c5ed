"""Networks of the user's own: which are refused when the policy is made, and which train."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import probes
import pytest
import torch
from torch import Tensor, nn

from grouprl import GRPO, UsageError
from grouprl.envs.own_network import check_network

QUICK: dict[str, Any] = {"preset": None, "n_envs": 4, "min_steps": 64, "max_steps": 64, "epochs": 2, "warmup_steps": 16}


class Applied(nn.Module):
    """A layer, and ``function`` of its outputs."""

    def __init__(self, inputs: int, outputs: int, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(inputs, outputs), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: (y, None), r"returns tuple .* must return \[4, 2\] numbers"),
        (lambda y: y[:, :1], r"returns \[4, 1\]"),
        (lambda y: y.argmax(1), r"returns \[4\] of torch.int64"),
        (lambda y: y.long(), r"of torch.int64"),
        (lambda y: y.mean(0, keepdim=True), r"returns \[1, 2\]"),
        (lambda y: y * float("nan"), "not finite"),
        (lambda y: y.detach(), "would never learn"),
        (lambda y: torch.from_numpy(y.detach().numpy()), "would never learn"),
        (lambda y: y - y.mean(0), "alone than beside others"),
        (lambda y: y + torch.rand_like(y), "draw no random numbers"),
        (lambda y: y.no_such_method(), "cannot take observations of shape .*no_such_method"),
    ],
)
def test_a_network_that_does_something_else_is_refused(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_network(Applied(3, 2, function), 3, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda i, o: nn.Linear(i, o + 2), "must return"),
        (lambda i, o: nn.Linear(i + 1, o), "cannot take observations"),
        (lambda i, o: nn.Linear(i, o).half(), "all float32 or all float64"),
        (lambda i, o: nn.Sequential(nn.Linear(i, 8).double(), nn.Linear(8, o)), "all float32 or all float64"),
        (lambda i, o: "linear", "must return a torch.nn.Module"),
        (lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, o)),
         "cannot take observations|alone than beside"),
    ],
)  # fmt: skip
def test_a_wrong_network_is_refused_at_construction(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GRPO(probes.Truncated, network=build, **QUICK)


def test_layers_that_behave_otherwise_in_training_are_named() -> None:
    def build(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, outputs))

    with pytest.warns(UserWarning, match="dropout is off and batch norm keeps the statistics it began with"):
        agent = GRPO(probes.Truncated, network=build, **QUICK)
    assert not agent.policy.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPO(probes.Truncated, network=lambda i, o: nn.Sequential(nn.LayerNorm(i), nn.Linear(i, o)), **QUICK)


def test_a_network_in_float64_learns_what_one_in_float32_does() -> None:
    def build(inputs: int, outputs: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    agents = [
        GRPO("Pendulum-v1", network=network, **QUICK | {"collect": "segments", "n_steps": 32}).learn(300)
        for network in (build, lambda i, o: build(i, o).double())
    ]
    single, double = ([p.detach() for p in agent.policy.parameters()] for agent in agents)
    assert {p.dtype for p in double} == {torch.float64}
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-3)
    action, _ = agents[1].predict(np.zeros(3, np.float32))
    assert action.dtype == np.float32

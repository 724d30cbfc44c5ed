"""Our Adam takes PyTorch's steps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from grouprl.envs import mlp
from grouprl.envs.adam import Adam, kernels
from grouprl.learning.parameters import TrainedParameters


def parameters(values: torch.Tensor) -> TrainedParameters:
    """Those of a module with the numbers ``values``, in two parameters."""
    halves = values.clone().tensor_split(2)
    return TrainedParameters(nn.ParameterList([nn.Parameter(half) for half in halves]))


def step(optimizer: Adam, gradient: torch.Tensor) -> None:
    optimizer.parameters.start()
    optimizer.parameters.add(gradient.clone())
    optimizer.step()


def test_it_takes_the_steps_of_pytorchs_adam() -> None:
    torch.manual_seed(0)
    start = torch.randn(50, dtype=torch.float64)
    ours, theirs = parameters(start), nn.Parameter(start.clone())
    mine = Adam(ours, 0.01, eps=1e-5)
    reference = torch.optim.Adam([theirs], lr=0.01, eps=1e-5)
    for number in range(30):
        gradient = torch.randn(50, dtype=torch.float64) * 10.0 ** (number % 5 - 3)
        theirs.grad = gradient.clone()
        mine.learning_rate = reference.param_groups[0]["lr"] = 0.01 / (number + 1)
        step(mine, gradient)
        reference.step()
    torch.testing.assert_close(ours.values(), theirs.data, rtol=1e-12, atol=1e-12)


def test_it_is_compiled_together_with_the_network() -> None:
    # Of two libraries one might not load, where open files run out for example: other digits, with nothing said.
    assert kernels is mlp.kernels


@pytest.mark.skipif(not kernels.available, reason="there is no C compiler here")
def test_compiled_code_takes_the_same_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1003, generator=generator)
    compiled, plain = Adam(parameters(start), 0.01, eps=1e-5), Adam(parameters(start), 0.01, eps=1e-5, native=False)
    assert (compiled.native, plain.native) == (True, False)
    for number in range(30):
        gradient = torch.randn(1003, generator=generator) * 10.0 ** (number % 5 - 3)
        step(compiled, gradient)
        step(plain, gradient)
    one, other = (optimizer.parameters.values() for optimizer in (compiled, plain))
    assert float((one - start).abs().max()) > 0.05
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled.second, plain.second, rtol=1e-4, atol=0)


def test_what_is_not_float32_is_left_to_torch() -> None:
    assert not Adam(parameters(torch.ones(3, dtype=torch.float64)), 0.1).native


def test_it_goes_on_from_its_state() -> None:
    one, other = Adam(parameters(torch.ones(3)), 0.1), Adam(parameters(torch.ones(3)), 0.1)
    gradient = torch.tensor([1.0, -2.0, 3.0])
    step(one, gradient)
    other.load(one.state())
    other.parameters.load(one.parameters.values())
    step(one, gradient)
    step(other, gradient)
    assert torch.equal(one.parameters.values(), other.parameters.values())


def test_training_does_not_import_pytorchs_compiler() -> None:
    code = (
        "import sys; from grouprl import GRPO; GRPO('CartPole-v1', n_steps=16).learn(600); "
        "print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"

"""Our Adam takes PyTorch's steps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from grouprl.envs.adam import Adam, kernels


def test_it_takes_the_steps_of_pytorchs_adam() -> None:
    torch.manual_seed(0)
    start = torch.randn(50, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Adam(ours, 0.01, eps=1e-5)
    reference = torch.optim.Adam([theirs], lr=0.01, eps=1e-5)
    for step in range(30):
        gradient = torch.randn(50, dtype=torch.float64) * 10.0 ** (step % 5 - 3)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.learning_rate = reference.param_groups[0]["lr"] = 0.01 / (step + 1)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours.data, theirs.data, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not kernels.available, reason="there is no C compiler here")
def test_compiled_code_takes_the_same_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1003, generator=generator)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    compiled, plain = Adam(one, 0.01, eps=1e-5), Adam(other, 0.01, eps=1e-5, native=False)
    assert (compiled.native, plain.native) == (True, False)
    for step in range(30):
        gradient = torch.randn(1003, generator=generator) * 10.0 ** (step % 5 - 3)
        one.grad, other.grad = gradient.clone(), gradient.clone()
        compiled.step()
        plain.step()
    assert float((one.detach() - start).abs().max()) > 0.05
    torch.testing.assert_close(one.data, other.data, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled.second, plain.second, rtol=1e-4, atol=0)


def test_what_is_not_float32_is_left_to_torch() -> None:
    assert not Adam(nn.Parameter(torch.ones(3, dtype=torch.float64)), 0.1).native


def test_it_goes_on_from_its_state() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    one, other = Adam(first, 0.1), Adam(second, 0.1)
    first.grad = torch.tensor([1.0, -2.0, 3.0])
    one.step()
    other.load(one.state())
    second.data.copy_(first.data)
    second.grad = first.grad
    one.step()
    other.step()
    assert torch.equal(first, second)


def test_training_does_not_import_pytorchs_compiler() -> None:
    code = (
        "import sys; from grouprl import GRPO; GRPO('CartPole-v1', n_steps=16).learn(600); "
        "print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"

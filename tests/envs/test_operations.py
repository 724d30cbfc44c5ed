"""Quick operations against torch's own, in networks as users write them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from grouprl import GRPO
from grouprl.envs import operations
from grouprl.envs.operations import QuickOperations

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")), reason="there is no C compiler here"
)


class Written(nn.Module):
    """Layers called by hand, one of them twice, and a path around them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(inputs, 48), nn.Linear(48, 48), nn.Linear(48, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.tanh(self.first(x))
        h = h + self.again(h).tanh()
        return self.last(functional.silu(h + self.again(h)))


def stack(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, outputs))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which operations were done here."""
    made: list[str] = []

    def watched(name: str, quick: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(*args: Tensor) -> Tensor | None:
            out = quick(*args)
            if out is not None:
                made.append(name)
            return out

        return call

    table = {key: watched(value.__name__, value) for key, value in operations._QUICK.items()}
    monkeypatch.setattr(operations, "_QUICK", table)
    return made


@pytest.mark.parametrize(("build", "done"), [(Written, 5), (stack, 4)])
def test_outputs_and_gradients_are_torchs(build: Callable[[int, int], nn.Module], done: int, calls: list[str]) -> None:
    network = build(6, 3)
    x = torch.randn(600, 6, requires_grad=True)
    weight = torch.randn(600, 3)
    wanted = network(x)
    wanted_gradients = torch.autograd.grad(wanted, [x, *network.parameters()], weight)
    with QuickOperations():
        found = network(x)
    assert len(calls) == done
    gradients = torch.autograd.grad(found, [x, *network.parameters()], weight)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, wanted_gradients, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


class Potential(nn.Module):
    """Outputs are a gradient of what layers give, as of energy-based and Hamiltonian networks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.body(x).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0][:, : self.outputs]


class Checkpointed(nn.Module):
    """Makes what lies between its layers again in the backward pass."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = stack(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize("build", [Potential, Checkpointed])
def test_networks_that_differentiate_themselves_learn(build: Callable[[int, int], nn.Module]) -> None:
    network = build(6, 3)
    x, weight = torch.randn(600, 6, requires_grad=True), torch.randn(600, 3)
    leaves = [x, *network.parameters()]
    wanted = torch.autograd.grad(network(x), leaves, weight, allow_unused=True)
    with QuickOperations():
        out = network(x)
    found = torch.autograd.grad(out, leaves, weight, allow_unused=True)
    assert sum(g is not None for g in wanted) >= 4
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert float((one - other).norm()) <= 2e-5 * float(other.norm())


def test_many_gradients_at_once_and_forward_mode() -> None:
    network, x, direction = stack(6, 3), torch.randn(600, 6), torch.randn(600, 6)
    weights = torch.randn(4, 600, 3)
    wanted = torch.autograd.grad(network(x), list(network.parameters()), weights, is_grads_batched=True)
    with QuickOperations():
        found = torch.autograd.grad(network(x), list(network.parameters()), weights, is_grads_batched=True)
        _, tangent = torch.func.jvp(network, (x,), (direction,))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tangent, torch.func.jvp(network, (x,), (direction,))[1])


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e-2, 1.0, 30.0])
def test_tanh_is_exact_relative_to_its_value(scale: float) -> None:
    x = scale * torch.randn(20_001)
    with QuickOperations():
        found = torch.tanh(x)
    wanted = torch.tanh(x.double())
    assert float(((found - wanted) / wanted).abs().max()) < 4e-7


class Labelled(Tensor):
    """A subclass with nothing of its own."""


def test_a_gradient_of_a_gradient_through_tanh() -> None:
    x = torch.linspace(-3, 3, 20_000, requires_grad=True)
    with QuickOperations():
        y = torch.tanh(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, -2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda net, x: (net, x[:20]),
        lambda net, x: (net.double(), x.double()),
        lambda net, x: (net.bfloat16(), x.bfloat16()),
        lambda net, x: (torch.autocast("cpu", torch.bfloat16)(net), x),
        lambda net, x: (net, x.as_subclass(Labelled)),
        lambda net, x: (torch.func.vmap(net), x.view(6, 100, 6)),
        lambda net, x: (torch.jit.trace(net, x), x),
        lambda net, x: (torch.compile(net, backend="aot_eager", fullgraph=True), x),
    ],
    ids=[
        "few rows",
        "float64",
        "bfloat16",
        "autocast",
        "subclass",
        "function transform",
        "traced",
        "compiled",
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_it_cannot_do_is_left_to_torch(change: Callable, calls: list[str]) -> None:
    with torch.no_grad():
        network, x = change(stack(6, 3), torch.randn(600, 6))
        wanted = network(x)
        with QuickOperations():
            assert torch.equal(network(x), wanted)
    assert not calls


def test_a_view_with_the_sign_turned_is_not_read_as_it_lies_in_memory() -> None:
    network, x = stack(6, 3), torch.randn(600, 6)
    with QuickOperations():
        torch.testing.assert_close(network(torch._neg_view(x)), network(-x))


@pytest.mark.parametrize("width", [5, 7])
def test_inputs_that_do_not_fit_are_torchs_own_error(width: int) -> None:
    with QuickOperations(), pytest.raises(RuntimeError, match="mat1 and mat2"):
        stack(6, 3)(torch.zeros(600, width))


def test_nan_stays_nan() -> None:
    with QuickOperations():
        assert torch.isnan(stack(6, 3)(torch.full((600, 6), torch.nan))).all()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_an_update_of_a_users_network_is_the_same_on_compiled_code_and_on_torch(env_id: str, calls: list[str]) -> None:
    short = {"n_envs": 4, "min_steps": 2048, "min_signals": 0, "warmup_steps": 64, "epochs": 2, "minibatch_size": 512}
    agents = [
        GRPO(env_id, preset=None, network=stack, native=native, seed=3, **short).learn(2000) for native in (False, True)
    ]
    assert {"_tanh", "_linear"} <= set(calls)
    theirs, ours = (agent.loop.learner.parameters.vector.detach().numpy() for agent in agents)
    before = GRPO(env_id, preset=None, network=stack, seed=3).loop.learner.parameters.vector.detach().numpy()
    assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(ours - before)

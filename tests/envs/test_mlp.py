"""The compiled network against the same layers in torch, in float64."""

from __future__ import annotations

import copy
import gc
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from grouprl import GRPO
from grouprl.envs import mlp
from grouprl.envs.mlp import MAX_LAYERS, MLP
from grouprl.machine.compile import Kernels

compiled = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")), reason="there is no C compiler here"
)


def network(widths: tuple[int, ...], activation: str = "tanh", native: bool = True) -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MLP(widths[0], widths[-1], widths[1:-1], activation, 2**0.5, 0.5, native)
        with torch.no_grad():
            for layer in made.layers:
                layer.bias.normal_()  # type: ignore[union-attr, operator]
    return made


def exact(net: MLP, x: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Outputs, gradients of the parameters and of ``x`` for the loss ``sum(weight * out)``, by torch in float64."""
    twin = network((x.shape[1], *(layer.out_features for layer in net.layers)), native=False)  # type: ignore[misc]
    twin.tanh = net.tanh
    twin.load_state_dict(net.state_dict())
    twin, x = twin.double(), x.double().requires_grad_()
    out = twin(x)
    *gradients, dx = torch.autograd.grad((weight * out).sum(), [*twin.parameters(), x])
    return out.detach(), gradients, dx


@compiled
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("rows", [1, 2, 5, 95, 96, 97, 700])
@pytest.mark.parametrize("widths", [(4, 64, 64, 2), (3, 1, 1), (17, 33, 16, 9), (1, 100, 7, 80, 3), (200, 48, 40)])
def test_outputs_and_gradients_are_those_of_the_layers(widths: tuple[int, ...], rows: int, activation: str) -> None:
    net = network(widths, activation)
    assert net.native
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, widths[0], generator=generator).requires_grad_()
    weight = torch.randn(rows, widths[-1], generator=generator)
    out = net(x)
    *gradients, dx = torch.autograd.grad((weight * out).sum(), [*net.parameters(), x])
    wanted, wanted_gradients, wanted_dx = exact(net, x.detach(), weight)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=1e-4, atol=2e-5)
    for found, right in zip(gradients, wanted_gradients, strict=True):
        assert found.shape == right.shape
        assert float((found - right).norm()) <= 1e-5 * float(right.norm()) + 1e-12


@compiled
def test_the_hyperbolic_tangent_is_within_4e_7_everywhere() -> None:
    net = network((1, 1, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0 if parameter.ndim == 2 else 0.0)
    x = torch.cat([torch.linspace(-12, 12, 400_001), torch.logspace(-30, 30, 2001), torch.tensor([0.0])])[:, None]
    wanted = torch.tanh(x.double())
    with torch.no_grad():
        found = net(x).double()
    assert float((found - wanted).abs().max()) < 4e-7
    small = x.abs() < 1e-2
    torch.testing.assert_close(found[small], wanted[small], rtol=4e-7, atol=0)
    assert net(torch.tensor([[0.0]])).item() == 0.0


@compiled
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_what_is_not_finite_comes_out_and_is_not_swallowed(activation: str) -> None:
    net = network((2, 16, 1), activation)
    out = net(torch.tensor([[float("nan"), 0.0], [1.0, 1.0]]))
    assert torch.isnan(out[0]).all()
    assert torch.isfinite(out[1]).all()


@compiled
def test_a_row_does_not_depend_on_those_beside_it() -> None:
    net = network((4, 64, 64, 2))
    x = torch.randn(203, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(net(x), torch.cat([net(row[None]) for row in x]))


@compiled
def test_parameters_that_share_one_vector_and_rows_that_lie_apart_are_read_where_they_are() -> None:
    net = network((4, 16, 2))
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(2))
    wanted = net(x[:, :4].contiguous())
    vector = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    at = 0
    for p in net.parameters():
        p.data = vector[at : at + p.numel()].view(p.shape)
        at += p.numel()
    assert torch.equal(net(x[:, :4]), wanted)


@pytest.mark.parametrize("hidden", [(), (8,) * MAX_LAYERS])
def test_no_hidden_layer_or_too_many_are_torch_operations(hidden: tuple[int, ...]) -> None:
    net = network((3, *hidden, 2))
    assert not net.native
    assert net(torch.zeros(5, 3)).shape == (5, 2)


def test_other_number_types_are_torch_operations() -> None:
    net = network((3, 8, 2)).double()
    assert net(torch.zeros(5, 3, dtype=torch.float64)).dtype == torch.float64


@compiled
@pytest.mark.parametrize("shape", [(5, 2), (5, 9), (4,), (0, 3)])
def test_inputs_that_do_not_fit_are_torchs_own_error(shape: tuple[int, ...]) -> None:
    net = network((4, 8, 2))
    for call in (lambda: net(torch.zeros(shape)), lambda: net.inference()(np.zeros(shape, np.float32))):
        if shape == (4,):
            assert call().shape == (2,)
        else:
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                call()


@compiled
def test_parameters_that_compiled_code_cannot_read_are_left_to_torch() -> None:
    net = network((4, 8, 2))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    wanted = net(x)
    net.layers[0].weight.data = net.layers[0].weight.data.t().contiguous().t()
    torch.testing.assert_close(net(x), wanted)
    net.double()
    with pytest.raises(RuntimeError, match="dtype"):
        net(x)


@compiled
def test_parameters_that_were_replaced_are_the_ones_that_count() -> None:
    net = network((4, 8, 2))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    before = net(x)
    zeros = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    assert not torch.func.functional_call(net, zeros, (x,)).any()
    twin = copy.deepcopy(net)
    twin.load_state_dict(zeros, assign=True)
    assert not twin(x).any()
    assert not twin.inference()(x.numpy()).any()
    assert torch.equal(net(x), before)


@compiled
def test_calls_leave_nothing_behind() -> None:
    net = network((4, 8, 2))
    x = np.zeros((3, 4), np.float32)
    net.inference()(x)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2000):
            net.inference()(x)
        assert gc.collect() < 1000  # one object a call would be more; threads of other tests may leave some
    finally:
        gc.enable()


def test_without_a_compiler_it_is_torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "kernels", Kernels(Path(mlp.__file__).parent / "native", ["network.c"]))
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert not network((3, 8, 2)).native


@compiled
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_an_update_is_the_same_on_compiled_code_and_on_torch(env_id: str) -> None:
    short = {"n_envs": 4, "min_steps": 256, "min_signals": 0, "warmup_steps": 64, "epochs": 2, "minibatch_size": 64}
    agents = [GRPO(env_id, preset=None, native=native, seed=3, **short).learn(100) for native in (True, False)]
    assert [agent.policy.network.native for agent in agents] == [True, False]
    ours, theirs = (agent.loop.learner.parameters.values().numpy() for agent in agents)
    before = GRPO(env_id, preset=None, seed=3).loop.learner.parameters.values().numpy()
    # Adam divides by how large a gradient usually is: where that is next to nothing, rounding shows.
    assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(ours - before)


@compiled
@pytest.mark.parametrize("flags", ["-march=x86-64-v2", "-march=x86-64-v3", "-march=x86-64-v4"])
def test_the_source_compiles_for_older_processors_without_a_warning(flags: str, tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("variants of another processor")
    strict = ["-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-psabi", flags]
    mlp.kernels._compile([shutil.which("cc") or "gcc"], strict, tmp_path / "kernels.so")
    assert (tmp_path / "kernels.so").stat().st_size > 10_000

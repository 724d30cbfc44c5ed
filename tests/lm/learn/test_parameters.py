"""The trained weights of a model, their gradient, and the optimizer of both."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from grouprl.errors import UsageError
from grouprl.learning.parameters import TrainedParameters, norm_of
from grouprl.lm.learn.optimizer import load_optimizer_state, make_optimizer, make_schedule, optimizer_state
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.settings.config import GRPOConfig


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 3))
    model[3].weight = model[0].weight  # tied, though of no use: [4, 3]
    model[1].bias.requires_grad_(False)
    return model.to(dtype)


def forward(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """All but the last layer, whose bias is then out of reach."""
    return model[2](torch.tanh(model[1](model[0](x)))).square().sum()


def storages(model: nn.Module) -> list[int]:
    return [p.untyped_storage().nbytes() for p in model.parameters()]


def test_weights_keep_their_own_storage_and_nothing_of_the_gradient_stays_with_them() -> None:
    model = net()
    places, sizes = [p.data_ptr() for p in model.parameters()], storages(model)
    master = TrainedParameters(model)
    assert master.size == 12 + 4 + 4 + 12 + 3 + 3  # the tied weight once, the frozen bias not at all
    with master.written_in_place():
        master.start()
        forward(model, torch.ones(1, 3)).backward()
        master.finish()
        master.gradient.fill_(3.0)
        for p in model.parameters():
            assert p.grad is None if not p.requires_grad else p.grad.unique().tolist() == [3.0]
    assert [p.data_ptr() for p in model.parameters()] == places
    assert storages(model) == sizes == [p.numel() * 4 for p in model.parameters()]
    assert all(p.grad is None and not vars(p) for p in model.parameters())
    assert model[3].weight is model[0].weight


def test_matrices_alone_decay() -> None:
    groups = make_optimizer(TrainedParameters(net()), GRPOConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [[p.dim() for p in group["params"]] for group in groups] == [[2, 2], [1, 1, 1, 1]]


def test_a_model_of_matrices_alone_has_one_group() -> None:
    assert len(make_optimizer(TrainedParameters(nn.Linear(2, 2, bias=False)), GRPOConfig()).param_groups) == 1


def test_the_optimizer_does_what_adamw_does_on_the_parameters() -> None:
    ours, theirs = net(), net()
    config = GRPOConfig(learning_rate=0.05, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    master = TrainedParameters(ours)
    optimizer = make_optimizer(master, config)
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": 0.2},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.05, betas=(0.8, 0.9), eps=1e-6,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with master.written_in_place():
        for _ in range(5):
            x = torch.randn(6, 3, generator=generator)
            master.start()
            forward(ours, x).backward()
            master.finish()
            reference.zero_grad(set_to_none=False)
            forward(theirs, x).backward()
            optimizer.step()
            reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_returns_the_norm_and_scales_to_the_bound(dtype: torch.dtype) -> None:
    master = TrainedParameters(nn.Linear(3, 1, bias=False).to(dtype))
    with master.written_in_place():
        master.gradient.copy_(torch.tensor([2.0, 3.0, 6.0]))
        assert master.clip(10.0) == 7.0
        assert master.gradient.tolist() == [2.0, 3.0, 6.0]
        assert master.clip(0.0) == 7.0  # no bound
        assert master.gradient.tolist() == [2.0, 3.0, 6.0]
        assert master.clip(3.5) == 7.0
        assert master.gradient.tolist() == pytest.approx([1.0, 1.5, 3.0], rel=1e-5)
        assert master.clip(1.0) == pytest.approx(3.5, rel=1e-5)


def test_the_norm_is_over_parameters_of_all_types() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False).to(torch.bfloat16))
    master = TrainedParameters(model)
    with master.written_in_place():
        master.start()
        (model[0].weight.sum() * 2 + model[1].weight.sum() * 1).backward()
        master.finish()
        assert [p.grad.dtype for p in master.tensors] == [torch.float32, torch.bfloat16]
        assert master.clip(1.5) == pytest.approx(3.0)
        assert [p.grad.flatten().tolist() for p in master.tensors] == [pytest.approx([1, 1], 1e-4), [0.5]]


def test_a_gradient_lies_in_the_vector_whoever_wrote_it_and_is_0_where_nobody_did() -> None:
    ours, theirs = net(), net()
    master = TrainedParameters(ours)
    x = torch.ones(2, 3)
    with master.written_in_place():
        for products in (None, LowPrecision(ours, torch.float32)):
            master.gradient.fill_(7.0)  # of the step before
            master.start()
            theirs.zero_grad()
            for _ in range(2):  # two micro-batches
                with products.learning() if products else nullcontext():
                    forward(ours, x).backward()
                forward(theirs, x).backward()
            master.finish()
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                if a.requires_grad:
                    torch.testing.assert_close(a.grad, torch.zeros_like(a) if b.grad is None else b.grad)
            assert not ours[3].bias.grad.any()  # out of reach
            before = [p.grad.clone() for p in master.tensors]
            master.gradient.mul_(2.0)
            assert all(torch.equal(p.grad, 2 * g) for p, g in zip(master.tensors, before, strict=True))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return net()


def share_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: net().requires_grad_(False), "no trainable parameter"),
        (lambda: net().half(), r"parameter 0.weight is float16.*dtype=torch.float32"),
        (lambda: nn.Sequential(net(), nn.Linear(2, 2).half()), r"parameter 1.weight is float16"),
        (lambda: net().to("meta"), "meta device"),
        (made_in_inference_mode, "inference_mode"),
        (share_memory, "0.weight and 1.weight are two, but share their memory"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TrainedParameters(make())


def replace(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace, "parameter 0.weight was replaced"),
        (lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True), "was replaced"),
        (lambda m: m.double(), "0.weight became float64, from float32"),
        (lambda m: m[2].half(), "2.weight became float16"),
        (lambda m: m[2].requires_grad_(False), r"2.weight was frozen \(requires_grad=False\)"),
        (lambda m: m[1].requires_grad_(True), r"1.bias was made trainable \(requires_grad=True\)"),
        (lambda m: m.append(nn.Linear(1, 1)), "new parameter 4.weight"),
        (lambda m: m.pop(2), "2.bias was replaced"),
        (lambda m: m.pop(3), "3.bias is gone"),
        (lambda m: setattr(m[3], "weight", nn.Parameter(torch.ones(3, 3))), "new parameter 3.weight"),  # tie broken
        (lambda m: nn.utils.parametrize.register_parametrization(m[2], "weight", nn.Tanh()), "2.parametrizations"),
        (lambda m: setattr(m[2].weight, "data", torch.ones(7, 4)), r"shape from \[3, 4\] to \[7, 4\]"),
        (lambda m: m.to("meta"), "0.weight.*meta|replaced"),
    ],
)
def test_a_model_whose_parameters_are_others_than_before_is_refused(change: Callable[[Any], Any], said: str) -> None:
    model = net()
    master = TrainedParameters(model)
    master.check()
    change(model)
    with pytest.raises(UsageError, match=said):
        master.check()


def test_parameters_that_got_another_storage_are_trained_where_they_are() -> None:
    model = net()
    master = TrainedParameters(model)
    optimizer = make_optimizer(master, GRPOConfig(learning_rate=0.1))
    model.half().float()
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    copies = copy.deepcopy(model)
    master.check()
    with master.written_in_place():
        master.start()
        forward(model, torch.ones(1, 3)).backward()
        master.finish()
        optimizer.step()
    moved = {n: not torch.equal(p, q) for (n, p), q in zip(model.named_parameters(), copies.parameters(), strict=True)}
    assert moved == {n: n not in ("1.bias", "3.bias") for n in moved}


def test_the_parameter_that_is_not_finite_is_named() -> None:
    model = net()
    master = TrainedParameters(model)
    assert master.not_finite() == ""
    for bad in (float("nan"), float("inf")):
        model[2].bias.data[1] = bad
        assert master.not_finite() == "2.bias"


def test_an_optimizer_goes_on_from_its_state() -> None:
    config = GRPOConfig(learning_rate=0.01)

    def fresh():
        master = TrainedParameters(net())
        return master, make_optimizer(master, config)

    def steps(master: TrainedParameters, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        with master.written_in_place():
            master.start()
            master.finish()
            for i in numbers:
                master.gradient.copy_(torch.randn(master.size, generator=torch.Generator().manual_seed(i)))
                optimizer.step()

    master, optimizer = fresh()
    steps(master, optimizer, range(3))
    tensors, meta = optimizer_state(optimizer)
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    tensors = {name: value.clone() for name, value in tensors.items()}
    resumed, resumed_optimizer = fresh()
    resumed.load(master.values())
    load_optimizer_state(resumed_optimizer, tensors, meta, own_settings=False)
    steps(master, optimizer, range(3, 6))
    steps(resumed, resumed_optimizer, range(3, 6))
    assert torch.equal(master.values(), resumed.values())
    assert float((master.values() - TrainedParameters(net()).values()).abs().max()) > 0.02


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler_type": "constant"}, [1, 1, 1, 1, 1]),
        ({}, [1, 0.75, 0.5, 0.25, 0]),
        ({"warmup_steps": 2}, [0, 0.5, 1, 0.5, 0]),
        ({"warmup_steps": 0.5}, [0, 0.5, 1, 0.5, 0]),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}},
            [1, None, 0.75, None, 0.5],
        ),
    ],
)
def test_the_learning_rate_follows_the_schedule(settings: dict, expected: list) -> None:
    config = GRPOConfig(learning_rate=0.01, **settings)
    optimizer = make_optimizer(TrainedParameters(net()), config)
    schedule = make_schedule(optimizer, config, total_steps=4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"] / 0.01)
        optimizer.step()
        schedule.step()
    assert [a for a, b in zip(rates, expected, strict=True) if b is not None] == pytest.approx(
        [b for b in expected if b is not None]
    )


@pytest.mark.parametrize("n", [0, 5, 4096, 100_000, 20_000_000])
def test_the_norm_of_a_long_gradient_is_right(n: int) -> None:
    """torch adds squares one behind the other in float32: the norm of so many is off by far more."""
    vector = torch.full((n,), 1e-3)
    assert math.isclose(norm_of(vector), 1e-3 * math.sqrt(n), rel_tol=2e-6)

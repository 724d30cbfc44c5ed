"""The master weights as one vector, and the optimizer on it."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from grouprl.errors import UsageError
from grouprl.learning.parameters import FlatParameters
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


def test_parameters_and_gradients_are_views_of_two_vectors() -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    master = FlatParameters(model, decayed_first=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    master.vector.data.fill_(2.0)
    master.gradient.fill_(3.0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.unique().tolist() == [2.0]
            assert p.grad.unique().tolist() == [3.0]
        else:
            assert torch.equal(p, before[name])
            assert p.grad is None
    assert len(master.vector) == 12 + 4 + 4 + 12 + 3 + 3  # the tied weight once, the frozen bias not at all
    assert model[3].weight is model[0].weight


def test_matrices_come_first_and_alone_decay() -> None:
    master = FlatParameters(net(), decayed_first=True)
    assert [p.dim() for p in master.tensors] == [2, 2, 1, 1, 1, 1]
    assert master.n_decayed == 24
    decayed, others = master.slices()
    assert (decayed[0].numel(), others[0].numel()) == (24, 14)
    assert decayed[0].data_ptr() == master.vector.data_ptr()
    assert others[0].grad.data_ptr() == master.gradient[24:].data_ptr()
    groups = make_optimizer(master, GRPOConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_a_model_of_matrices_alone_has_one_group() -> None:
    master = FlatParameters(nn.Linear(2, 2, bias=False), decayed_first=True)
    assert [len(part) for part in master.slices()] == [1, 0]
    assert len(make_optimizer(master, GRPOConfig()).param_groups) == 1


def test_the_optimizer_on_the_vector_does_what_adamw_does_on_the_parameters() -> None:
    ours, theirs = net(), net()
    config = GRPOConfig(learning_rate=0.05, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    master = FlatParameters(ours, decayed_first=True)
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
    master = FlatParameters(nn.Linear(3, 1, bias=False).to(dtype), decayed_first=True)
    master.gradient.copy_(torch.tensor([2.0, 3.0, 6.0]))
    assert master.clip(10.0) == 7.0
    assert master.gradient.tolist() == [2.0, 3.0, 6.0]
    assert master.clip(0.0) == 7.0  # no bound
    assert master.gradient.tolist() == [2.0, 3.0, 6.0]
    assert master.clip(3.5) == 7.0
    assert master.gradient.tolist() == pytest.approx([1.0, 1.5, 3.0], rel=1e-5)
    assert master.clip(1.0) == pytest.approx(3.5, rel=1e-5)


def test_a_gradient_lies_in_the_vector_whoever_wrote_it_and_is_0_where_nobody_did() -> None:
    ours, theirs = net(), net()
    master = FlatParameters(ours, decayed_first=True)
    x = torch.ones(2, 3)
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


def test_a_model_that_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UsageError, match="no trainable parameter"):
        FlatParameters(net().requires_grad_(False), decayed_first=True)
    mixed = net()
    mixed[2].to(torch.bfloat16)
    with pytest.raises(UsageError, match=r"bfloat16 on cpu, torch.float32 on cpu"):
        FlatParameters(mixed, decayed_first=True)
    mixed[2].requires_grad_(False)
    assert FlatParameters(mixed, decayed_first=True).vector.dtype == torch.float32


def test_an_optimizer_goes_on_from_its_state() -> None:
    config = GRPOConfig(learning_rate=0.01)

    def fresh():
        master = FlatParameters(net(), decayed_first=True)
        return master, make_optimizer(master, config)

    def step(master: FlatParameters, optimizer: torch.optim.Optimizer, i: int) -> None:
        master.gradient.copy_(torch.randn(len(master.gradient), generator=torch.Generator().manual_seed(i)))
        optimizer.step()

    master, optimizer = fresh()
    for i in range(3):
        step(master, optimizer, i)
    tensors, meta = optimizer_state(optimizer)
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    tensors = {name: value.clone() for name, value in tensors.items()}
    resumed, resumed_optimizer = fresh()
    resumed.vector.data.copy_(master.vector)
    load_optimizer_state(resumed_optimizer, tensors, meta, own_settings=False)
    for i in range(3, 6):
        step(master, optimizer, i)
        step(resumed, resumed_optimizer, i)
    assert torch.equal(master.vector, resumed.vector)


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
    optimizer = make_optimizer(FlatParameters(net(), decayed_first=True), config)
    schedule = make_schedule(optimizer, config, total_steps=4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"] / 0.01)
        optimizer.step()
        schedule.step()
    assert [a for a, b in zip(rates, expected, strict=True) if b is not None] == pytest.approx(
        [b for b in expected if b is not None]
    )

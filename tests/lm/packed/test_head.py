"""The head fused with the log-probability, against the definition in float64."""

import pytest
import torch
from torch import Tensor, nn

from grouprl.lm.packed.head import log_probs
from grouprl.lm.packed.low_precision import LowPrecision

V, D = 300, 24


def inputs(m: int, *, bias: bool, seed: int = 0) -> tuple[Tensor, nn.Parameter, nn.Parameter | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(m, D, generator=generator).requires_grad_()
    weight = nn.Parameter(torch.randn(V, D, generator=generator) * 0.5)
    b = nn.Parameter(torch.randn(V, generator=generator)) if bias else None
    return h, weight, b, torch.randint(V, (m,), generator=generator)


def by_definition(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float):
    z = h.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    all_logp = (z / temperature).log_softmax(-1)
    return all_logp.gather(1, targets[:, None])[:, 0], -(all_logp.exp() * all_logp).sum(-1)


def products(dtype: torch.dtype = torch.float32) -> LowPrecision:
    return LowPrecision(nn.Module(), dtype)


@pytest.mark.parametrize("m", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_entropies_and_gradients_are_those_of_the_definition(
    m: int, bias: bool, temperature: float
) -> None:
    h, weight, b, targets = inputs(m, bias=bias)
    upstream = torch.randn(m, generator=torch.Generator().manual_seed(1))
    logp, entropy = by_definition(h, weight, b, targets, temperature)
    leaves = [h, weight] + ([] if b is None else [b])
    wanted = torch.autograd.grad((logp * upstream).sum(), leaves)
    terms = log_probs(h, weight, b, targets, temperature, products())
    assert terms.logp.dtype == terms.entropy.dtype == torch.float32
    assert not terms.entropy.requires_grad
    torch.testing.assert_close(terms.logp, logp.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(terms.entropy, entropy.float(), rtol=0, atol=1e-5)
    (terms.logp * upstream).sum().backward()
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("both", [False, True], ids=["entropies alone", "with log-probabilities"])
def test_entropies_carry_a_gradient_where_that_is_asked_for(bias: bool, temperature: float, both: bool) -> None:
    h, weight, b, targets = inputs(33, bias=bias)
    upstream = torch.randn(2, 33, generator=torch.Generator().manual_seed(1))
    if not both:
        upstream[0] = 0
    logp, entropy = by_definition(h, weight, b, targets, temperature)
    leaves = [h, weight] + ([] if b is None else [b])
    wanted = torch.autograd.grad((torch.stack([logp, entropy]) * upstream).sum(), leaves)
    terms = log_probs(h, weight, b, targets, temperature, products(), by_entropy=True)
    torch.testing.assert_close(terms.entropy, entropy.float(), rtol=0, atol=1e-5)
    (torch.stack([terms.logp, terms.entropy]) * upstream).sum().backward()
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=2e-5)


def test_the_gradient_of_entropies_is_as_exact_as_low_precision_is() -> None:
    h, weight, _, targets = inputs(64, bias=False)
    _, entropy = by_definition(h, weight, None, targets, 0.7)
    wanted = torch.autograd.grad(entropy.sum(), [h, weight])
    log_probs(h, weight, None, targets, 0.7, products(torch.bfloat16), by_entropy=True).entropy.sum().backward()
    for leaf, gradient in zip([h, weight], wanted, strict=True):
        assert float((leaf.grad - gradient).norm() / gradient.norm()) < 0.02


def test_a_token_of_probability_0_adds_nothing_to_the_gradient_of_an_entropy() -> None:
    h = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    terms = log_probs(h, nn.Parameter(torch.eye(3)), None, torch.tensor([1]), 1.0, products(), by_entropy=True)
    terms.entropy.sum().backward()
    torch.testing.assert_close(h.grad, torch.zeros(1, 3))


def test_gradients_are_added_to_those_that_are_there_in_place() -> None:
    h, weight, b, targets = inputs(5, bias=True)
    assert b is not None
    log_probs(h, weight, b, targets, 1.0, products()).logp.sum().backward()
    once = weight.grad.clone(), b.grad.clone()
    places = weight.grad.data_ptr(), b.grad.data_ptr()
    log_probs(h.detach(), weight, b, targets, 1.0, products()).logp.sum().backward()
    assert (weight.grad.data_ptr(), b.grad.data_ptr()) == places
    torch.testing.assert_close(weight.grad, 2 * once[0])
    torch.testing.assert_close(b.grad, 2 * once[1])


def test_a_frozen_head_gets_no_gradient_and_passes_it_on() -> None:
    h, weight, b, targets = inputs(5, bias=True)
    assert b is not None
    log_probs(h, weight, b, targets, 1.0, products()).logp.sum().backward()
    wanted, h.grad, weight.grad, b.grad = h.grad, None, None, None
    weight.requires_grad_(False)
    b.requires_grad_(False)
    log_probs(h, weight, b, targets, 1.0, products()).logp.sum().backward()
    assert weight.grad is None
    assert b.grad is None
    torch.testing.assert_close(h.grad, wanted, rtol=0, atol=0)


def test_nothing_is_differentiated_without_a_gradient() -> None:
    h, weight, b, targets = inputs(3, bias=True)
    with torch.no_grad():
        terms = log_probs(h, weight, b, targets, 0.5, products())
    torch.testing.assert_close(terms.logp, by_definition(h, weight, b, targets, 0.5)[0].float(), rtol=0, atol=1e-5)
    assert not terms.logp.requires_grad


def test_logits_of_any_size_give_finite_numbers() -> None:
    h, weight, _, targets = inputs(20, bias=False)
    huge = (h.detach() * 1e4).requires_grad_()
    terms = log_probs(huge, weight, None, targets, 1.0, products())
    terms.logp.sum().backward()
    logp, entropy = by_definition(huge, weight, None, targets, 1.0)
    torch.testing.assert_close(terms.logp, logp.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.entropy, entropy.float(), rtol=0, atol=1e-2)
    assert bool(torch.isfinite(huge.grad).all() and torch.isfinite(weight.grad).all())


def test_a_token_that_is_almost_certain_keeps_its_gradient_in_bfloat16() -> None:
    # 1 - p is 0.001: rounded to bfloat16, p would be 1 and the gradient 0.
    weight = nn.Parameter(torch.eye(2))
    h = torch.tensor([[6.90675, 0.0]], requires_grad=True)
    p_other = float(torch.tensor([6.90625, 0.0]).softmax(0)[1])  # 6.90625 is the bfloat16 next to it
    log_probs(h, weight, None, torch.tensor([0]), 1.0, products(torch.bfloat16)).logp.sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[p_other, -p_other]]), rtol=0.01, atol=0)


def test_low_precision_is_as_exact_as_the_products_and_no_less() -> None:
    h, weight, b, targets = inputs(64, bias=True)
    assert b is not None
    upstream = torch.randn(64, generator=torch.Generator().manual_seed(1))
    logp, _ = by_definition(h, weight, b, targets, 0.7)
    leaves = [h, weight, b]
    wanted = torch.autograd.grad((logp * upstream).sum(), leaves)

    def errors(value: Tensor) -> list[float]:
        (value.float() * upstream).sum().backward()
        found = [leaf.grad.double() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        distance = [float((value.double() - logp).norm() / logp.norm())]
        return distance + [
            float((a - g.double()).norm() / g.double().norm()) for a, g in zip(found, wanted, strict=True)
        ]

    ours = errors(log_probs(h, weight, b, targets, 0.7, products(torch.bfloat16)).logp)
    with torch.autocast("cpu", torch.bfloat16):
        z = nn.functional.linear(h, weight, b).float() / 0.7
    autocast = errors(z.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    assert all(a <= 1.25 * b for a, b in zip(ours, autocast, strict=True)), (ours, autocast)

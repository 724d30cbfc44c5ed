import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grouprl.errors import UsageError
from grouprl.objective import (
    beyond,
    cispo,
    clipped,
    dppo,
    dppo_mask,
    ratio,
    sapo,
    spo,
    vespo,
)


def with_delta(logp, old, a):
    return clipped(logp, old, a, delta=3.0)


def dppo_kl(logp, old, a):
    return dppo(logp, old, a, 0.05, "kl")


def vespo_of_single_steps(logp, old, a):
    return vespo(logp, old, a, torch.ones(len(logp), dtype=torch.int64))


SURROGATES = [clipped, with_delta, cispo, sapo, dppo, dppo_kl, spo, vespo_of_single_steps]


def at_ratios(ratios):
    logp = torch.tensor(ratios, dtype=torch.float64).log()
    return logp.requires_grad_(), torch.zeros(len(ratios), dtype=torch.float64)


def approx(*expected):
    return pytest.approx(list(expected), abs=1e-12)


def test_clipped_by_hand():
    logp, old = at_ratios([1.0, 1.5, 0.5, 1.5, 0.5])
    a = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0], dtype=torch.float64)
    loss = clipped(logp, old, a)
    assert loss.tolist() == approx(-2.0, -2.4, -1.0, 3.0, 1.6)
    loss.sum().backward()
    # gradient -rho A where the clip does not bind, 0 where it does
    assert logp.grad.tolist() == approx(-2.0, 0.0, -1.0, 3.0, 0.0)


def test_the_two_clips_are_set_apart():
    logp, old = at_ratios([1.25, 0.75])
    a = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert clipped(logp, old, a, epsilon=0.2, epsilon_high=0.28).tolist() == approx(-1.25, 0.8)


def test_delta_bounds_the_loss_of_bad_steps_only():
    logp, old = at_ratios([5.0, 5.0, 2.0])
    a = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    loss = clipped(logp, old, a, delta=3.0)
    assert loss.tolist() == approx(3.0, -1.2, 2.0)
    loss.sum().backward()
    assert logp.grad.tolist() == approx(0.0, 0.0, 2.0)


def test_a_delta_of_4_by_hand():
    logp, old = at_ratios([1.0, 5.0, 3.0, 5.0, 0.5])
    a = torch.tensor([2.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss = clipped(logp, old, a, delta=4.0)
    assert loss.tolist() == approx(-2.0, 4.0, 3.0, -1.2, 0.8)
    loss.sum().backward()
    assert logp.grad.tolist() == approx(-2.0, 0.0, 3.0, 0.0, 0.0)


@given(st.lists(st.tuples(st.floats(-4, 4), st.floats(-3, 3)), min_size=1, max_size=8))
def test_a_delta_is_the_dual_clip_of_its_paper(steps):
    """Where A < 0 the loss is at most -delta A (1912.09729); elsewhere nothing changes."""
    log_ratio, a = torch.tensor(steps, dtype=torch.float64).T
    old = torch.zeros_like(a)
    two, dual = (log_ratio.clone().requires_grad_() for _ in range(2))
    got, plain = clipped(two, old, a, 0.2, 0.3, delta=3.0), clipped(dual, old, a, 0.2, 0.3)
    expected = torch.where(a < 0, torch.minimum(plain, -3.0 * a), plain)
    assert_close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert_close(two.grad, dual.grad)


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
    logp, old = at_ratios([1.0, 8.0, 0.25, 8.0])
    a = torch.tensor([2.0, 2.0, 2.0, -1.0], dtype=torch.float64)
    loss = cispo(logp, old, a, cap=5.0)
    assert loss.tolist() == approx(0.0, -10.0 * math.log(8.0), 0.5 * math.log(4.0), 5.0 * math.log(8.0))
    loss.sum().backward()
    assert logp.grad.tolist() == approx(-2.0, -10.0, -0.5, 5.0)


def test_cispo_with_the_bounds_of_the_paper_is_a_clip_around_one():
    logp, old = at_ratios([1.5, 0.5])
    cispo(logp, old, torch.ones(2, dtype=torch.float64), cap=1.0 + 0.28, floor=1.0 - 0.2).sum().backward()
    assert logp.grad.tolist() == approx(-1.28, -0.8)


def test_sapo_by_hand():
    logp, old = at_ratios([1.0, 2.0, 2.0])
    a = torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64)
    loss = sapo(logp, old, a, tau_positive=1.0, tau_negative=2.0)

    def sigmoid(x):
        return 1.0 / (1.0 + math.exp(-x))

    assert loss.tolist() == approx(-6.0, -4.0 * sigmoid(1.0), 2.0 * sigmoid(2.0))
    loss.sum().backward()
    gate = [4.0 * sigmoid(x) * (1.0 - sigmoid(x)) for x in (1.0, 2.0)]
    assert logp.grad.tolist() == approx(-3.0, -2.0 * gate[0], 2.0 * gate[1])


def test_dppo_drops_what_has_moved_too_far_along_its_advantage():
    old = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.01], dtype=torch.float64).log()
    logp = torch.tensor([0.8, 0.8, 0.2, 0.2, 0.05], dtype=torch.float64).log().requires_grad_()
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    # a rare action may grow fivefold: its probability moved by 0.04 only
    assert dppo_mask(logp, old, a, threshold=0.2).tolist() == [False, True, True, False, True]
    loss = dppo(logp, old, a, threshold=0.2)
    assert loss.tolist() == approx(0.0, 1.6, -0.4, 0.0, -5.0)
    loss.sum().backward()
    assert logp.grad.tolist() == approx(0.0, 1.6, -0.4, 0.0, -5.0)


def test_dppo_keeps_what_moved_by_less_than_the_threshold():
    old, new = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.65, 0.35]).log()
    assert dppo_mask(new, old, torch.tensor([1.0, -1.0]), threshold=0.2).tolist() == [True, True]
    assert dppo_mask(new, old, torch.tensor([1.0, -1.0]), threshold=0.1).tolist() == [False, False]


def test_dppo_by_the_binary_divergence():
    # p_old = .5: KL to .8 is .5 log(.5 / .8) + .5 log(.5 / .2) = .2231, to .6 it is .0204; of .01 and .05 it is .0243
    old = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.01], dtype=torch.float64).log()
    logp = torch.tensor([0.8, 0.8, 0.2, 0.6, 0.05], dtype=torch.float64).log().requires_grad_()
    a = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    assert dppo_mask(logp, old, a, 0.05, "kl").tolist() == [False, True, False, True, True]
    assert dppo_mask(logp, old, a, 0.02, "kl").tolist() == [False, True, False, False, False]
    assert dppo_mask(logp, old, a, 0.2232, "kl").tolist() == [True] * 5
    loss = dppo(logp, old, a, 0.05, "kl")
    assert loss.tolist() == approx(0.0, 1.6, 0.0, -1.2, -5.0)
    loss.sum().backward()
    assert logp.grad.tolist() == approx(0.0, 1.6, 0.0, -1.2, -5.0)


def test_vespo_weighs_a_sample_by_the_ratio_of_all_its_steps():
    # samples of 2 and 1 steps: W = 2 * .75 = 1.5 with A = 2, and W = .5 with A = -1
    logp, old = at_ratios([2.0, 0.75, 0.5])
    a = torch.tensor([2.0, 2.0, -1.0], dtype=torch.float64)
    loss = vespo(logp, old, a, torch.tensor([2, 1]))
    phi = [1.5**2 * math.exp(3.0 * (1 - 1.5)), 0.5**3 * math.exp(2.0 * (1 - 0.5))]  # W^k e^(lambda (1 - W))
    assert loss.tolist() == approx(
        -phi[0] * 2.0 * math.log(2.0), -phi[0] * 2.0 * math.log(0.75), phi[1] * math.log(0.5)
    )
    loss.sum().backward()
    assert logp.grad.tolist() == approx(-2.0 * phi[0], -2.0 * phi[0], phi[1])


def test_spo_by_hand():
    logp, old = at_ratios([1.0, 1.2, 1.4, 0.8])
    a = torch.tensor([2.0, 2.0, 2.0, -2.0], dtype=torch.float64)
    loss = spo(logp, old, a)
    # -(rho A - |A| / .4 (rho - 1)^2)
    assert loss.tolist() == approx(-2.0, -2.2, -2.0, 1.8)
    loss.sum().backward()
    # d/dlogp = -rho (A - |A| (rho - 1) / .2): flat on the edge of the range, back inwards outside it
    assert logp.grad.tolist() == approx(-2.0, 0.0, 2.8, 0.0)


def test_beyond_marks_the_steps_without_gradient():
    logp, old = at_ratios([1.0, 1.5, 0.5, 1.5, 0.5, 1.5])
    a = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, 0.0], dtype=torch.float64)
    low, high = beyond(logp, old, a, 0.8, 1.2)
    assert low.tolist() == [False, False, False, False, True, False]
    assert high.tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("surrogate", SURROGATES)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_at_ratio_one_the_gradient_is_minus_the_advantage(surrogate, advantages):
    a = torch.tensor(advantages, dtype=torch.float64)
    logp = torch.linspace(-3.0, -0.1, len(a), dtype=torch.float64, requires_grad=True)
    surrogate(logp, logp.detach(), a).sum().backward()
    assert_close(logp.grad, -a)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("gap", [1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_an_overflowing_ratio_leaves_loss_and_gradient_finite(surrogate, gap, advantage):
    logp = torch.tensor([gap], requires_grad=True)
    loss = surrogate(logp, torch.zeros(1), torch.tensor([advantage]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logp.grad).all()
    if advantage == 0.0:
        assert logp.grad.item() == 0.0


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_log_probabilities_give_a_finite_float32_loss(surrogate, dtype):
    logp = torch.tensor([60.0, -60.0, -1.0], dtype=dtype)
    loss = surrogate(logp, torch.zeros(3, dtype=dtype), torch.tensor([-1.0, 1.0, 1.0]))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()


def test_a_bad_step_grown_far_too_likely_is_still_pushed_down():
    logp = torch.tensor([50.0], requires_grad=True)
    clipped(logp, torch.zeros(1), torch.tensor([-1.0])).sum().backward()
    assert logp.grad.item() == pytest.approx(math.exp(20.0), rel=1e-5)


def test_ratio_is_exact_below_its_cap():
    assert_close(ratio(torch.tensor([0.0, 19.0]), torch.zeros(2)), torch.tensor([1.0, math.exp(19.0)]))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_no_gradient_flows_into_the_old_policy_or_the_advantages(surrogate):
    logp, old, a = (torch.tensor([0.1], requires_grad=True) for _ in range(3))
    surrogate(logp, old, a).sum().backward()
    assert old.grad is None
    assert a.grad is None


def test_shapes_and_clips_that_do_not_fit_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(UsageError, match="logp_old"):
        clipped(one, two, one)
    with pytest.raises(UsageError, match="advantages"):
        spo(one, one, two)
    with pytest.raises(UsageError, match="epsilon must"):
        clipped(one, one, one, epsilon=1.5)
    with pytest.raises(UsageError, match="delta must exceed"):
        clipped(one, one, one, delta=1.2)
    with pytest.raises(UsageError, match="cap must"):
        cispo(one, one, one, cap=0.28)
    with pytest.raises(UsageError, match="floor"):
        cispo(one, one, one, floor=1.1)
    with pytest.raises(UsageError, match="tau"):
        sapo(one, one, one, tau_negative=0.0)
    with pytest.raises(UsageError, match="threshold"):
        dppo(one, one, one, threshold=1.0)
    with pytest.raises(UsageError, match="divergence must"):
        dppo(one, one, one, divergence="js")
    with pytest.raises(UsageError, match="lambda_negative must"):
        vespo(one, one, one, torch.tensor([1]), lambda_negative=0.0)
    with pytest.raises(UsageError, match="epsilon must"):
        spo(one, one, one, epsilon=0.0)


def test_an_action_that_the_old_policy_never_took_has_the_largest_ratio():
    logp = torch.tensor([-1.0, -torch.inf], requires_grad=True)
    found = ratio(logp, torch.tensor([-torch.inf, -1.0]))
    assert found.tolist() == pytest.approx([math.exp(20.0), 0.0])
    (gradient,) = torch.autograd.grad(found.sum(), logp)
    assert gradient.tolist() == pytest.approx([math.exp(20.0), 0.0])

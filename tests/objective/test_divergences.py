import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence
from torch.testing import assert_close

from grouprl.errors import UsageError
from grouprl.objective import bernoulli_kl, categorical_kl, gaussian_kl, k1, k2, k3, sampled_kl_loss

MASKS = [-1e9, torch.finfo(torch.float32).min, -math.inf]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_categorical_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert_close(categorical_kl(p, q), torch.tensor([0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)]))


def test_categorical_kl_ignores_the_scale_of_logits():
    p, q = random(4, 5), random(4, 5, seed=1)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    assert_close(categorical_kl(p + 100.0, q - 7.0), expected)


@pytest.mark.parametrize("mask_p", MASKS)
@pytest.mark.parametrize("mask_q", MASKS)
def test_masked_actions_add_nothing_to_categorical_kl_nor_to_its_gradient(mask_p, mask_q):
    p = torch.tensor([[0.3, mask_p, -0.2]], requires_grad=True)
    q = torch.tensor([[-0.1, mask_q, 0.4]], requires_grad=True)
    small_p, small_q = (x.detach()[:, [0, 2]].requires_grad_() for x in (p, q))
    full, small = categorical_kl(p, q), categorical_kl(small_p, small_q)
    assert_close(full, small)
    full.sum().backward()
    small.sum().backward()
    for got, expected in ((p.grad, small_p.grad), (q.grad, small_q.grad)):
        assert_close(got[:, [0, 2]], expected)
        assert got[0, 1] == 0.0


def test_categorical_kl_is_infinite_where_p_does_what_q_cannot():
    assert categorical_kl(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])).item() == math.inf


def test_gaussian_kl_by_hand():
    # sigma 1 -> 2, means 0 and 2: log 2 + (1 + 4) / 8 - 1/2; two actions, the second equal
    mean_p, mean_q = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    log_p, log_q = torch.zeros(2), torch.tensor([math.log(2.0), 0.0])
    assert_close(gaussian_kl(mean_p, log_p, mean_q, log_q), torch.tensor([math.log(2.0) + 0.125]))


def test_gaussian_kl_agrees_with_torch():
    mp, sp, mq, sq = (random(6, 3, seed=i) for i in range(4))
    expected = kl_divergence(Normal(mp, sp.exp()), Normal(mq, sq.exp())).sum(-1)
    assert_close(gaussian_kl(mp, sp, mq, sq), expected)


def test_bernoulli_kl_agrees_with_torch():
    p, q = random(6, 3), random(6, 3, seed=1)
    expected = kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)).sum(-1)
    assert_close(bernoulli_kl(p, q), expected)


def test_bernoulli_kl_by_hand_and_for_certain_actions():
    # p = 1/2, q = 3/4; and p certain: -log q = log 2
    p, q = torch.tensor([[0.0], [math.inf], [1e4]]), torch.tensor([[math.log(3.0)], [0.0], [0.0]])
    expected = [0.5 * math.log(2.0 / 3.0) + 0.5 * math.log(2.0), math.log(2.0), math.log(2.0)]
    assert_close(bernoulli_kl(p, q), torch.tensor(expected))


def test_the_three_estimators_by_hand():
    logp, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert_close(k1(logp, ref), torch.tensor([math.log(2.0)]))
    assert_close(k2(logp, ref), torch.tensor([math.log(2.0) ** 2 / 2.0]))
    assert_close(k3(logp, ref), torch.tensor([math.log(2.0) - 0.5]))


def test_k3_stays_finite_far_from_the_reference():
    logp = torch.tensor([-500.0], requires_grad=True)
    value = k3(logp, torch.zeros(1))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logp.grad).all()


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased_values(estimator):
    logits, ref = random(5), random(5, seed=1)
    logp, logr = logits.log_softmax(-1), ref.log_softmax(-1)
    assert_close((logp.exp() * estimator(logp, logr)).sum(), categorical_kl(logits, ref))


def exact_gradient(logits, ref):
    logits = logits.clone().requires_grad_()
    categorical_kl(logits, ref).backward()
    return logits.grad


def enumerated_gradient(logits, loss_of, sampling):
    """Gradient of the mean loss over samples from `sampling`, every action weighed by its probability."""
    logits = logits.clone().requires_grad_()
    (sampling.softmax(-1) * loss_of(logits.log_softmax(-1))).sum().backward()
    return logits.grad


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_sampled_loss_has_the_gradient_of_the_exact_kl(estimator):
    logits, ref = random(5), random(5, seed=1)
    logr = ref.log_softmax(-1)
    got = enumerated_gradient(logits, lambda logp: sampled_kl_loss(logp, logr, estimator), sampling=logits)
    assert_close(got, exact_gradient(logits, ref))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_sampled_loss_has_that_gradient_on_samples_of_an_older_policy_too(estimator):
    logits, ref, older = random(5), random(5, seed=1), random(5, seed=2)
    logr, logo = ref.log_softmax(-1), older.log_softmax(-1)
    got = enumerated_gradient(logits, lambda logp: sampled_kl_loss(logp, logr, estimator, logo), sampling=older)
    assert_close(got, exact_gradient(logits, ref))


@pytest.mark.parametrize("drop", [1.0, 18.0, 19.9, 29.0, 60.0])
def test_k3_is_exact_where_the_policy_has_all_but_ruled_an_action_out(drop):
    """There rho is tiny and exp(-d) huge, and their product is ref / old."""
    old, ref, logp = -1.0, -2.0, torch.tensor([-2.0 - drop], requires_grad=True)
    loss = sampled_kl_loss(logp, torch.tensor([ref]), "k3", torch.tensor([old]))
    loss.sum().backward()
    d, rho = -drop, math.exp(ref - drop - old)
    torch.testing.assert_close(loss.item(), math.exp(ref - old) + rho * (d - 1.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(logp.grad.item(), rho * d, rtol=1e-5, atol=0)


def test_the_bare_estimators_have_other_gradients_which_is_why_the_loss_exists():
    logits, ref = random(5), random(5, seed=1)
    logr = ref.log_softmax(-1)
    bare_k1 = enumerated_gradient(logits, lambda logp: k1(logp, logr), sampling=logits)
    assert_close(bare_k1, torch.zeros(5, dtype=torch.float64))
    bare_k3 = enumerated_gradient(logits, lambda logp: k3(logp, logr), sampling=logits)
    forward = logits.clone().requires_grad_()
    categorical_kl(ref, forward).backward()
    assert_close(bare_k3, forward.grad)


@pytest.mark.parametrize(("name", "value"), [("k1", k1), ("k2", k2), ("k3", k3)])
def test_on_policy_the_sampled_loss_has_the_value_of_its_estimator(name, value):
    logp, ref = random(4), random(4, seed=1)
    assert_close(sampled_kl_loss(logp, ref, name), value(logp, ref))


def test_shapes_and_names_that_do_not_fit_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(UsageError, match="logits_q"):
        categorical_kl(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(UsageError, match="logp_ref"):
        k1(one, two)
    with pytest.raises(UsageError, match="estimator must be"):
        sampled_kl_loss(one, one, "k4")

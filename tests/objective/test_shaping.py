import math

import pytest
import torch
from torch.testing import assert_close

from grouprl.errors import UsageError
from grouprl.objective import categorical_kl, kl_in_reward, outcome, soft_overlong


def test_each_step_pays_for_its_own_divergence():
    rewards = torch.tensor([0.0, 1.0])
    old, ref = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.25]).log()
    d = math.log(2.0)
    for estimator, value in (("k1", d), ("k2", d * d / 2.0), ("k3", 0.5 + d - 1.0)):
        assert_close(kl_in_reward(rewards, old, ref, 0.1, estimator), torch.tensor([-0.1 * value, 1.0]))


def test_no_penalty_leaves_the_rewards_as_they_are():
    rewards = torch.tensor([0.3, 1.0])
    assert torch.equal(kl_in_reward(rewards, torch.zeros(2), torch.ones(2), beta=0.0), rewards)


def test_the_return_of_a_sample_includes_the_penalty_of_all_its_steps():
    rewards, lengths, group = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([2, 1]), torch.zeros(2, dtype=torch.int64)
    paid = kl_in_reward(rewards, torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-2.0, -3.0, -1.0]), beta=0.5)
    assert paid.tolist() == [-0.5, 0.5, 1.0]
    # returns 0 and 1
    assert outcome(paid, lengths, group, scale="none").tolist() == [-0.5, -0.5, 0.5]


def test_the_gradient_that_follows_from_the_penalty_is_that_of_the_divergence():
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, logr = logits.log_softmax(-1), ref.log_softmax(-1)
    reward = kl_in_reward(torch.zeros_like(ref), logp, logr, beta=1.0)
    assert not reward.requires_grad
    (logp.exp().detach() * -reward * logp).sum().backward()
    again = logits.detach().requires_grad_()
    categorical_kl(again, ref).backward()
    assert_close(logits.grad, again.grad)


def test_the_overlong_penalty_falls_from_zero_to_minus_one_over_the_cache():
    got = soft_overlong(torch.tensor([1, 80, 81, 90, 99, 100, 101, 500]), max_length=100, cache=20)
    assert_close(got, torch.tensor([0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0, -1.0]))


def test_without_a_cache_the_overlong_penalty_is_a_step():
    assert soft_overlong(torch.tensor([99, 100, 101]), max_length=100, cache=0).tolist() == [0.0, 0.0, -1.0]


def test_arguments_that_do_not_fit_are_refused():
    one = torch.zeros(1)
    with pytest.raises(UsageError, match="estimator"):
        kl_in_reward(one, one, one, 0.1, "k4")
    with pytest.raises(UsageError, match="beta"):
        kl_in_reward(one, one, one, -0.1)
    with pytest.raises(UsageError, match="rewards has shape"):
        kl_in_reward(torch.zeros(2), one, one, 0.1)
    with pytest.raises(UsageError, match="logp_ref"):
        kl_in_reward(one, one, torch.zeros(2), 0.1)
    for max_length, cache in ((100, 101), (100, -1), (0, 0)):
        with pytest.raises(UsageError, match="cache"):
            soft_overlong(torch.tensor([5]), max_length, cache)

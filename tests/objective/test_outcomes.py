import math
from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import batches, check_permuted
from torch.testing import assert_close

from grouprl.errors import TrainingError, UsageError
from grouprl.objective import batch_returns, gdpo, maxrl, opo, outcome, pass_at_k, reinforce_pp, standardise

# Returns 3, 1 | 5, 5; groups interleaved on purpose.
REWARDS = torch.tensor([1.0, 2.0, 5.0, 1.0, 2.0, 3.0])
LENGTHS = torch.tensor([2, 1, 1, 2])
GROUP = torch.tensor([7, -3, 7, -3])
ONE_GROUP = torch.zeros(3, dtype=torch.int64)
NAN = float("nan")


def ones(n):
    return torch.ones(n, dtype=torch.int64)


# --- maxrl, opo ------------------------------------------------------------------------------------------------------
def test_maxrl_divides_by_the_groups_mean_return():
    assert maxrl(REWARDS, LENGTHS, GROUP).tolist() == [0.5, 0.5, 0.0, -0.5, 0.0, 0.0]


def test_maxrl_weighs_a_success_the_more_the_rarer_it_is():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert maxrl(rewards, ones(4), torch.zeros(4, dtype=torch.int64)).tolist() == [3.0, -1.0, -1.0, -1.0]


def test_maxrl_of_a_group_without_success_is_exactly_zero():
    assert maxrl(torch.zeros(3), ones(3), ONE_GROUP).tolist() == [0.0, 0.0, 0.0]


def test_maxrl_refuses_negative_returns():
    with pytest.raises(UsageError, match=r"sample 1 has return -0\.5"):
        maxrl(torch.tensor([1.0, -0.5, 0.0]), ones(3), ONE_GROUP)


def test_opo_weighs_the_returns_of_the_baseline_by_length():
    rewards, lengths = torch.tensor([0.0, 0.0, 4.0, 8.0]), torch.tensor([3, 1])
    # (3 * 4 + 1 * 8) / 4 = 5
    assert opo(rewards, lengths, torch.zeros(2, dtype=torch.int64)).tolist() == [-1.0, -1.0, -1.0, 3.0]


@given(st.integers(0, 2**31))
def test_the_steps_of_a_group_have_opo_advantages_of_mean_zero(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (6,), generator=generator)
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    rewards = torch.randn(int(lengths.sum()), generator=generator, dtype=torch.float64)
    got, owner = opo(rewards, lengths, group), torch.repeat_interleave(group, lengths)
    for g in (0, 1):
        assert_close(got[owner == g].sum(), torch.tensor(0.0, dtype=torch.float64), rtol=0.0, atol=1e-12)


# --- pass@k ----------------------------------------------------------------------------------------------------------
def test_pass_at_the_group_size_rewards_only_the_best_by_its_lead():
    rewards, group = torch.tensor([0.5, 3.0, 2.0, 1.0, 4.0]), torch.tensor([0, 0, 0, 1, 1])
    assert pass_at_k(rewards, ones(5), group).tolist() == [0.0, 1.0, 0.0, 0.0, 3.0]


def test_a_tie_for_the_best_leaves_nothing():
    assert pass_at_k(torch.tensor([1.0, 0.0, 1.0]), ones(3), ONE_GROUP).tolist() == [0.0, 0.0, 0.0]
    # 0.1 + 0.2 and 0.3 are a tie but for rounding
    got = pass_at_k(torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64), torch.tensor([2, 1, 1]), ONE_GROUP)
    assert got.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_pass_at_k_of_binary_rewards_counts_the_subsets_a_success_saves():
    # 1 of 4 right, k = 2: every subset with it fails without it; 2 of 4: 2 of its 3 subsets have no other success
    one, two = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    group = torch.zeros(4, dtype=torch.int64)
    assert_close(pass_at_k(one, ones(4), group, k=2), one)
    assert_close(pass_at_k(two, ones(4), group, k=2), two * 2.0 / 3.0)


def brute_force(returns, k):
    out = []
    for i, own in enumerate(returns):
        gains = []
        for others in combinations([r for j, r in enumerate(returns) if j != i], k - 1):
            gains.append(max(own, *others) - max(others))
        out.append(sum(gains) / len(gains))
    return out


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 1.0, -2.0, 3.5, 7.0]), min_size=2, max_size=7), min_size=1, max_size=3
    ),
    st.integers(2, 7),
    st.randoms(use_true_random=False),
)
def test_pass_at_k_equals_the_mean_over_all_subsets(groups, k, random):
    k = min(k, *(len(g) for g in groups))
    expected = torch.tensor([a for g in groups for a in brute_force(g, k)], dtype=torch.float64)
    rewards = torch.tensor([r for g in groups for r in g], dtype=torch.float64)
    group = torch.tensor([i for i, g in enumerate(groups) for _ in g])
    order = list(range(len(rewards)))
    random.shuffle(order)
    got = pass_at_k(rewards[order], ones(len(order)), group[order], k)
    assert_close(got, expected[order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pass_at_k_is_an_unbiased_gradient_of_the_expected_maximum(k):
    """Every group of 4 draws from a policy over 3 actions, weighed by its probability."""
    values = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.2, -1.0], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    groups = torch.tensor(list(product(range(3), repeat=4)))
    ids = torch.repeat_interleave(torch.arange(len(groups)), 4)
    advantages = pass_at_k(values[groups].flatten(), ones(ids.numel()), ids, k).view_as(groups)
    chance = logp.detach()[groups].sum(1).exp()
    estimate = (k / 4) * (chance * (advantages * logp[groups]).sum(1)).sum()
    subsets = torch.tensor(list(product(range(3), repeat=k)))
    expected_maximum = (logp[subsets].sum(1).exp() * values[subsets].amax(1)).sum()
    got = torch.autograd.grad(estimate, logits, retain_graph=True)
    assert_close(got, torch.autograd.grad(expected_maximum, logits))


def test_pass_at_k_refuses_a_k_the_groups_cannot_fill():
    with pytest.raises(UsageError, match="at least 2"):
        pass_at_k(REWARDS, LENGTHS, GROUP, k=1)
    with pytest.raises(UsageError, match="smallest has 2"):
        pass_at_k(REWARDS, LENGTHS, GROUP, k=3)


# --- gdpo ------------------------------------------------------------------------------------------------------------
def test_gdpo_of_one_function_is_the_group_z_score_over_the_batchs_std():
    rewards, group = torch.tensor([3.0, 1.0, 5.0, 2.0, 9.0]), torch.tensor([0, 0, 1, 1, 1])
    expected = standardise(outcome(rewards, ones(5), group, eps=0.0))
    assert_close(gdpo(rewards[:, None], torch.tensor([2.0]), ones(5), group, eps=0.0), expected)


def test_gdpo_by_hand_scales_each_function_before_it_adds_them():
    # both functions say +-1 in units of their own std (ddof 0), whatever their size
    rewards = torch.tensor([[1.0, 100.0], [0.0, 300.0]])
    group = torch.zeros(2, dtype=torch.int64)
    # a = 2 - 1, -2 + 1: std 1
    got = gdpo(rewards, torch.tensor([2.0, 1.0]), torch.tensor([2, 1]), group, eps=0.0, ddof=0)
    assert_close(got, torch.tensor([1.0, 1.0, -1.0]))
    # eps enters twice: 0.5 / (0.5 + 1), 100 / (100 + 1), then a / (|a| + 1)
    a = 2.0 / 3.0 - 100.0 / 101.0
    got = gdpo(rewards, torch.tensor([2.0, 1.0]), torch.tensor([1, 1]), group, eps=1.0, ddof=0)
    assert_close(got, torch.tensor([a, -a]) / (abs(a) + 1.0))


def test_what_does_not_apply_is_left_out_and_adds_nothing():
    # function 1 applies to samples 0 and 2 alone; nothing applies to sample 3
    rewards = torch.tensor([[1.0, 4.0], [0.0, NAN], [2.0, 6.0], [NAN, NAN]])
    got = gdpo(rewards, torch.tensor([1.0, 1.0]), ones(4), torch.zeros(4, dtype=torch.int64), eps=0.0)
    root = 1.0 / math.sqrt(2.0)
    a = torch.tensor([0.0 - root, -1.0, 1.0 + root])
    assert_close(got, torch.cat((a / a.std(), torch.zeros(1))))


def test_a_function_that_tells_a_group_nothing_adds_exactly_zero():
    rewards = torch.tensor([[0.1, 1.0], [0.1, 1.0], [0.1, 5.0], [0.1, 3.0]])
    got = gdpo(rewards, torch.tensor([1.0, 1.0]), ones(4), torch.tensor([0, 0, 1, 1]))
    assert got[:2].tolist() == [0.0, 0.0]
    assert got[2] > 0.0
    assert got[3] < 0.0


def test_a_function_that_applies_to_one_sample_or_none_adds_exactly_zero():
    rewards = torch.tensor([[NAN, 1.0], [NAN, NAN], [NAN, NAN]])
    assert gdpo(rewards, torch.tensor([1.0, 1.0]), ones(3), ONE_GROUP).tolist() == [0.0, 0.0, 0.0]


def test_gdpo_refuses_what_does_not_fit():
    rewards = torch.zeros(3, 2)
    with pytest.raises(UsageError, match=r"weights \[F\]"):
        gdpo(rewards, torch.ones(3), ones(3), ONE_GROUP)
    with pytest.raises(UsageError, match="finite"):
        gdpo(rewards, torch.tensor([1.0, NAN]), ones(3), ONE_GROUP)
    with pytest.raises(UsageError, match="rewards_per_function"):
        gdpo(rewards[:2], torch.ones(2), ones(3), ONE_GROUP)
    rewards[1, 0] = math.inf
    with pytest.raises(TrainingError, match="function 0 gave sample 1"):
        gdpo(rewards, torch.ones(2), ones(3), ONE_GROUP)


# --- REINFORCE++ -----------------------------------------------------------------------------------------------------
def test_reinforce_pp_whitens_the_return_to_go_over_the_batch():
    got = reinforce_pp(REWARDS, LENGTHS, gamma=0.5)
    assert torch.equal(got, batch_returns(REWARDS, LENGTHS, 0.5))
    assert_close(got.mean(), torch.tensor(0.0), rtol=0.0, atol=1e-6)
    assert_close(got.std(), torch.tensor(1.0))


def test_the_baseline_is_taken_off_before_the_batch_is_whitened():
    rewards = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 7.0])
    lengths, group = torch.tensor([2, 2, 1, 1]), torch.tensor([0, 0, 1, 1])
    # R - mean: .5 .5 -.5 -.5 | -3.5 3.5, of mean 0 over the six steps
    centred = torch.tensor([0.5, 0.5, -0.5, -0.5, -3.5, 3.5])
    assert_close(reinforce_pp(rewards, lengths, group, baseline=True), centred / centred.std())
    discounted = standardise(torch.tensor([0.25, 0.5, -0.25, -0.5, -3.5, 3.5]))
    assert_close(reinforce_pp(rewards, lengths, group, gamma=0.5, baseline=True), discounted)


def test_whitening_does_not_shift_groups_with_nothing_to_tell_apart():
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0, 2.0])
    lengths, group = torch.tensor([3, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    got = reinforce_pp(rewards, lengths, group, baseline=True)
    assert got[4:].tolist() == [0.0, 0.0]
    assert (got[:4] != 0.0).all()


def test_reinforce_pp_refuses_what_does_not_fit():
    with pytest.raises(UsageError, match="pass group"):
        reinforce_pp(REWARDS, LENGTHS, baseline=True)
    for baseline in (True, False):
        with pytest.raises(UsageError, match=r"must lie in \[0, 1\]"):
            reinforce_pp(REWARDS, LENGTHS, GROUP, gamma=1.5, baseline=baseline)
    with pytest.raises(TrainingError, match="sample 1 has return"):
        reinforce_pp(torch.tensor([1.0, NAN]), ones(2))


# --- all -------------------------------------------------------------------------------------------------------------
def gdpo_of_returns(rewards, lengths, group):
    returns = torch.stack([x.sum() for x in rewards.split(lengths.tolist())])
    return gdpo(torch.stack((returns, -returns.abs().sqrt()), 1), torch.tensor([1.0, 0.3]), lengths, group)


ALL = [
    maxrl,
    opo,
    pass_at_k,
    gdpo_of_returns,
    lambda r, n, g: reinforce_pp(r, n, g, baseline=True),
]


@pytest.mark.parametrize("estimate", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, 1.0 / 3.0, 1e6 + 0.1, 0.0])
def test_a_group_of_equal_rewards_gets_exactly_zero_beside_one_that_differs(estimate, dtype, reward):
    rewards = torch.cat((torch.full((9,), reward), torch.tensor([2.0, 3.0]))).to(dtype)
    got = estimate(rewards, torch.tensor([3, 3, 3, 1, 1]), torch.tensor([4, 4, 4, 2, 2]))
    assert got.dtype == dtype
    assert got[:9].tolist() == [0.0] * 9
    assert (got[9:] != 0.0).any()


@pytest.mark.parametrize("estimate", ALL)
def test_a_group_of_one_gets_exactly_zero(estimate):
    assert estimate(torch.tensor([0.1, 0.7]), torch.tensor([2]), torch.tensor([4])).tolist() == [0.0, 0.0]


@given(batches(torch.rand), st.randoms(use_true_random=False))
def test_permuting_the_samples_permutes_the_advantages(batch, random):
    for estimate in ALL:
        check_permuted(estimate, batch, random)


@given(batches(torch.rand))
def test_every_step_of_a_sample_has_the_same_advantage(batch):
    for estimate in ALL:
        for piece in estimate(*batch).split(batch[1].tolist()):
            assert (piece == piece[0]).all()


def test_maxrl_takes_a_sum_that_misses_zero_by_rounding_for_zero():
    rewards = torch.tensor([0.1, 0.2, -0.3, 1.0, 0.0, 0.0])
    found = maxrl(rewards, torch.tensor([3, 3]), torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([-1.0] * 3 + [1.0] * 3)

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grouprl.errors import UsageError
from grouprl.objective import gae, returns_to_go

REWARDS = torch.tensor([1.0, 2.0, 4.0, 8.0])
LENGTHS = torch.tensor([3, 1])


def test_returns_to_go_by_hand():
    assert returns_to_go(REWARDS, LENGTHS, 0.5).tolist() == [3.0, 4.0, 4.0, 8.0]


def test_a_bootstrap_is_discounted_once_per_step_it_lies_ahead():
    # sample 0: +16 after three steps: 16/8, 16/4, 16/2; sample 1 terminated: 0
    got = returns_to_go(REWARDS, LENGTHS, 0.5, bootstrap=torch.tensor([16.0, 0.0]))
    assert got.tolist() == [5.0, 8.0, 12.0, 8.0]


def test_gae_by_hand():
    values, last = torch.tensor([2.0, 4.0, 2.0, 1.0]), torch.tensor([6.0, 0.0])
    # deltas: 1 + 2 - 2 = 1; 2 + 1 - 4 = -1; 4 + 3 - 2 = 5; 8 + 0 - 1 = 7; factor .5 * .5 = .25
    got = gae(REWARDS, values, last, LENGTHS, gamma=0.5, lam=0.5)
    assert got.tolist() == [1.0625, 0.25, 5.0, 7.0]


def test_gae_with_lambda_zero_is_the_temporal_difference():
    values, last = torch.tensor([2.0, 4.0, 2.0, 1.0]), torch.tensor([6.0, 0.0])
    assert gae(REWARDS, values, last, LENGTHS, gamma=0.5, lam=0.0).tolist() == [1.0, -1.0, 5.0, 7.0]


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5), st.sampled_from([0.0, 0.9, 0.99, 1.0]), st.integers(0, 2**31)
)
def test_gae_with_lambda_one_plus_the_values_is_the_bootstrapped_return_to_go(lengths, gamma, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    last = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    packed = torch.tensor(lengths)
    returns = returns_to_go(rewards, packed, gamma, bootstrap=last)
    assert_close(gae(rewards, values, last, packed, gamma, 1.0) + values, returns, rtol=1e-10, atol=1e-10)


def test_cutting_an_episode_and_bootstrapping_with_its_return_changes_nothing():
    whole = returns_to_go(REWARDS, torch.tensor([4]), 0.9)
    cut = returns_to_go(REWARDS, torch.tensor([2, 2]), 0.9, bootstrap=torch.stack((whole[2], torch.tensor(0.0))))
    assert_close(cut, whole)


def test_shapes_and_factors_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="rewards has shape"):
        returns_to_go(REWARDS[:3], LENGTHS, 0.9)
    with pytest.raises(UsageError, match="bootstrap has shape"):
        returns_to_go(REWARDS, LENGTHS, 0.9, bootstrap=torch.zeros(3))
    with pytest.raises(UsageError, match="values has shape"):
        gae(REWARDS, REWARDS[:3], torch.zeros(2), LENGTHS, 0.9, 0.9)
    with pytest.raises(UsageError, match=r"lam=1\.5"):
        gae(REWARDS, REWARDS, torch.zeros(2), LENGTHS, 0.9, 1.5)


def test_whole_numbers_are_refused_where_fractions_would_be_cut_off():
    one, lengths = torch.tensor([1.0, 2.0]), torch.tensor([2])
    for call in (
        lambda: returns_to_go(torch.tensor([1, 2]), lengths, 0.5),
        lambda: returns_to_go(one, lengths, 0.5, torch.tensor([1])),
        lambda: gae(one, torch.tensor([0, 0]), torch.tensor([0.5]), lengths, 1.0, 1.0),
        lambda: gae(one, one, torch.tensor([1]), lengths, 1.0, 1.0),
    ):
        with pytest.raises(UsageError, match=r"must be a floating-point tensor, got torch.int64"):
            call()

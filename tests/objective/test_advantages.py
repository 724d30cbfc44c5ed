import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import batches, check_permuted
from torch.testing import assert_close

from grouprl.errors import TrainingError, UsageError
from grouprl.objective import (
    batch_returns,
    degenerate_fraction,
    gigpo,
    leave_one_out,
    outcome,
    returns_to_go,
    shared_states,
    standardise,
    timestep,
)

# Returns 3, 1 | 5, 5; groups interleaved on purpose.
REWARDS = torch.tensor([1.0, 2.0, 5.0, 1.0, 2.0, 3.0])
LENGTHS = torch.tensor([2, 1, 1, 2])
GROUP = torch.tensor([7, -3, 7, -3])


def test_outcome_is_the_group_z_score_at_every_step():
    # group 7: mean 2, std sqrt(2); group -3: equal
    z = 1.0 / math.sqrt(2.0)
    assert_close(outcome(REWARDS, LENGTHS, GROUP), torch.tensor([z, z, 0.0, -z, 0.0, 0.0]))


def test_outcome_with_ddof_zero_divides_by_the_population_std():
    assert_close(outcome(REWARDS, LENGTHS, GROUP, ddof=0), torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0, 0.0]))


def test_outcome_unscaled_is_the_distance_from_the_group_mean():
    assert outcome(REWARDS, LENGTHS, GROUP, scale=False).tolist() == [1.0, 1.0, 0.0, -1.0, 0.0, 0.0]


def test_outcome_scaled_by_the_batch_divides_every_group_by_the_same_std():
    # returns 3, 1 | 5, 5 about their mean 3.5: squares .25 + 6.25 + 2.25 + 2.25 = 11
    for ddof, std in ((1, math.sqrt(11.0 / 3.0)), (0, math.sqrt(11.0 / 4.0))):
        got = outcome(REWARDS, LENGTHS, GROUP, scale="batch", ddof=ddof)
        assert_close(got, torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0, 0.0]) / std)
    assert_close(outcome(REWARDS, LENGTHS, GROUP, scale="batch", eps=1e9), torch.zeros(6), atol=1e-8, rtol=0.0)


def test_the_names_of_scales_mean_what_the_booleans_mean():
    assert torch.equal(outcome(REWARDS, LENGTHS, GROUP, scale="group"), outcome(REWARDS, LENGTHS, GROUP, scale=True))
    assert torch.equal(outcome(REWARDS, LENGTHS, GROUP, scale="none"), outcome(REWARDS, LENGTHS, GROUP, scale=False))


def test_outcome_adds_eps_to_the_std():
    got = outcome(REWARDS, LENGTHS, GROUP, ddof=0, eps=1.0)
    assert_close(got, torch.tensor([0.5, 0.5, 0.0, -0.5, 0.0, 0.0]))


def test_leave_one_out_by_hand():
    rewards = torch.tensor([1.0, 4.0, 10.0])
    got = leave_one_out(rewards, torch.tensor([1, 1, 1]), torch.zeros(3, dtype=torch.int64))
    assert_close(got, torch.tensor([1.0 - 7.0, 4.0 - 5.5, 10.0 - 2.5]))


def test_timestep_compares_equal_times_and_counts_ended_peers_as_zero():
    rewards = torch.tensor([1.0, 1.0, 1.0, 4.0, 2.0, 2.0])  # to go: 3 2 1 | 4 | 4 2
    lengths, group = torch.tensor([3, 1, 2]), torch.zeros(3, dtype=torch.int64)
    got = timestep(rewards, lengths, group)
    # t=0: 3-4, 4-3.5, 4-3.5; t=1: 2-(0+2)/2, 2-(2+0)/2; t=2: 1-0
    assert_close(got, torch.tensor([-1.0, 1.0, 1.0, 0.5, 0.5, 1.0]))
    mean_of_all = timestep(rewards, lengths, group, leave_one_out=False)
    assert_close(mean_of_all, got * 2.0 / 3.0)


def test_timestep_discounts_the_return_to_go():
    got = timestep(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([2, 1]), torch.zeros(2, dtype=torch.int64), gamma=0.5)
    assert_close(got, torch.tensor([1.0, 4.0, -1.0]))


def test_timestep_sees_credit_inside_an_episode_where_outcome_does_not():
    rewards, lengths = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([2, 2])
    group = torch.zeros(2, dtype=torch.int64)
    assert outcome(rewards, lengths, group).tolist() == [0.0] * 4
    assert timestep(rewards, lengths, group).tolist() == [0.0, -1.0, 0.0, 1.0]


STATES = torch.tensor([10, 11, 10, 12])


def by_gigpo(rewards, states=STATES, lengths=(2, 2), **settings):
    rewards, lengths = torch.tensor(rewards), torch.tensor(lengths)
    return gigpo(rewards, lengths, torch.zeros(len(lengths)).long(), torch.as_tensor(states), **settings)


def test_gigpo_adds_to_the_episode_what_a_step_is_worth_among_those_in_its_state():
    # returns 1, 0: +-.5. In state 10 returns-to-go 1, 0: +-.5. Nobody else was in 11 or 12.
    assert by_gigpo([0.0, 1.0, 0.0, 0.0], scale="none").tolist() == [1.0, 0.5, -1.0, -0.5]
    assert by_gigpo([0.0, 1.0, 0.0, 0.0], scale="none", weight=2.0).tolist() == [1.5, 0.5, -1.5, -0.5]
    assert by_gigpo([0.0, 1.0, 0.0, 0.0], scale="none", gamma=0.5).tolist() == [0.75, 0.5, -0.75, -0.5]
    z = 1 / math.sqrt(2.0)  # both terms are divided by a standard deviation of their own
    assert_close(by_gigpo([0.0, 1.0, 0.0, 0.0]), torch.tensor([2 * z, z, -2 * z, -z]))


def test_gigpo_compares_equal_states_at_whatever_time_and_visits_of_one_episode_too():
    # In state 5: returns-to-go 1, 1 | 0 with mean 2/3; returns 1, 0
    got = by_gigpo([0.0, 1.0, 0.0], [5, 5, 5], (2, 1), scale=False)
    assert_close(got, torch.tensor([0.5 + 1 / 3, 0.5 + 1 / 3, -0.5 - 2 / 3]))


def test_gigpo_compares_states_within_a_group_alone():
    rewards, lengths, states = torch.tensor([1.0, 0.0, 5.0, 3.0]), torch.ones(4).long(), torch.full((4,), 7)
    got = gigpo(rewards, lengths, torch.tensor([0, 0, 1, 1]), states, scale=False)
    assert got.tolist() == [1.0, -1.0, 2.0, -2.0]


def test_gigpo_without_equal_states_is_outcome():
    rewards = [0.3, 1.0, 0.0, 0.2]
    for states in ([0, 1, 2, 3], [-1, -1, -1, -1]):  # a negative state is equal to none
        wanted = outcome(torch.tensor(rewards), torch.tensor([2, 2]), torch.zeros(2).long())
        assert torch.equal(by_gigpo(rewards, states), wanted)
    assert torch.equal(by_gigpo(rewards, weight=0.0), wanted)


def test_shared_states_are_those_of_steps_with_a_partner_in_their_group():
    states = torch.tensor([4, 5, 4, -1, 4, -1])
    assert shared_states(torch.tensor([2, 2, 2]), torch.zeros(3).long(), states) == 0.5
    assert shared_states(torch.tensor([2, 2, 2]), torch.tensor([0, 0, 1]), states) == pytest.approx(1 / 3)
    with pytest.raises(UsageError, match="at least one step"):
        shared_states(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0).long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gigpo_calls_returns_to_go_equal_that_differ_by_rounding(dtype):
    rewards = torch.tensor([10.0, -10.0, 0.1, 0.2, 0.3], dtype=dtype)
    lengths, group = torch.tensor([4, 1]), torch.zeros(2).long()
    states = torch.tensor([9, 1, 0, 2, 0])  # returns-to-go .1 + .2 and .3 in state 0
    assert gigpo(rewards, lengths, group, states).tolist() == [0.0] * 5


def test_batch_returns_is_the_batch_standardised_return_to_go():
    rewards, lengths = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 1])
    # to go at .5: 2, 2, 4; mean 8/3, variance ((2/3)^2 * 2 + (4/3)^2) / 2 = 4/3
    std = math.sqrt(4.0 / 3.0)
    expected = torch.tensor([-2.0 / 3.0 / std, -2.0 / 3.0 / std, 4.0 / 3.0 / std])
    assert_close(batch_returns(rewards, lengths, 0.5), expected)


def test_standardise_uses_only_the_steps_asked_for():
    where = torch.tensor([True, True, False])
    # mean 2, std sqrt(2) from the first two; the third is shifted and scaled alike
    got = standardise(torch.tensor([1.0, 3.0, 8.0]), where)
    assert_close(got, torch.tensor([-1.0, 1.0, 6.0]) / math.sqrt(2.0))


@pytest.mark.parametrize("where", [None, torch.tensor([True, True, True]), torch.tensor([False, True, False])])
def test_standardise_gives_exactly_zero_where_there_is_nothing_to_tell_apart(where):
    assert standardise(torch.full((3,), 0.1), where).tolist() == [0.0, 0.0, 0.0]


def test_standardise_does_not_blow_up_rounding():
    a = torch.tensor([1.0, 1.0 + 2**-23, 1.0])
    assert standardise(a).tolist() == [0.0, 0.0, 0.0]


def test_standardise_refuses_a_mask_that_is_none():
    with pytest.raises(UsageError, match="where"):
        standardise(torch.ones(3), torch.ones(3))
    with pytest.raises(UsageError, match="where"):
        standardise(torch.ones(3), torch.ones(2, dtype=torch.bool))


EPISODE = [
    outcome,
    leave_one_out,
    lambda r, n, g: outcome(r, n, g, scale="batch"),
    lambda r, n, g: outcome(r, n, g, scale="none"),
    timestep,
]


@pytest.mark.parametrize("estimate", EPISODE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, 1.0 / 3.0, 1e6 + 0.1, -7.7])
def test_a_group_of_equal_rewards_gets_exactly_zero(estimate, dtype, reward):
    rewards = torch.full((9,), reward, dtype=dtype)  # sums of 0.1 * 3 leave a residue against their own mean
    got = estimate(rewards, torch.full((3,), 3), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(got, torch.zeros(9, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_returns_that_differ_by_rounding_get_exactly_zero(dtype):
    rewards = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.1], dtype=dtype)  # 0.1 + 0.2 is not 0.3 in binary
    lengths, group = torch.tensor([2, 1, 2]), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(outcome(rewards, lengths, group), torch.zeros(5, dtype=dtype))
    assert degenerate_fraction(rewards, lengths, group) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_more_in_a_long_episode_is_a_difference(dtype):
    lengths = torch.tensor([500, 499])
    got = outcome(torch.ones(999, dtype=dtype), lengths, torch.zeros(2, dtype=torch.int64), scale=False)
    assert got[0] == 0.5
    assert got[-1] == -0.5


@pytest.mark.parametrize("estimate", EPISODE)
def test_a_group_of_one_gets_exactly_zero(estimate):
    got = estimate(torch.tensor([0.1, 0.7]), torch.tensor([2]), torch.tensor([4]))
    assert got.tolist() == [0.0, 0.0]


def test_batch_returns_of_equal_returns_to_go_is_exactly_zero():
    assert batch_returns(torch.full((5,), 0.1), torch.ones(5, dtype=torch.int64), 0.99).tolist() == [0.0] * 5


def test_batch_returns_of_a_single_step_is_zero_and_not_nan():
    assert batch_returns(torch.tensor([3.0]), torch.tensor([1]), 0.99).tolist() == [0.0]


def test_degenerate_fraction_counts_groups_not_samples():
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 9.0])
    group = torch.tensor([0, 0, 0, 1, 1, 2])  # equal | different | alone
    assert degenerate_fraction(rewards, torch.ones(6, dtype=torch.int64), group) == pytest.approx(2.0 / 3.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named_by_its_sample(bad):
    rewards = torch.tensor([1.0, 2.0, bad])
    with pytest.raises(TrainingError, match="sample 1 has return"):
        outcome(rewards, torch.tensor([2, 1]), torch.tensor([0, 0]))


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="group has shape"):
        outcome(REWARDS, LENGTHS, GROUP[:3])
    with pytest.raises(UsageError, match="ddof"):
        outcome(REWARDS, LENGTHS, GROUP, ddof=2)
    for unknown in ("std", 1):
        with pytest.raises(UsageError, match="scale must"):
            outcome(REWARDS, LENGTHS, GROUP, scale=unknown)
    with pytest.raises(UsageError, match="floating-point"):
        outcome(REWARDS.long(), LENGTHS, GROUP)


@given(batches(), st.randoms(use_true_random=False))
def test_permuting_the_samples_permutes_the_advantages(batch, random):
    for estimate in EPISODE:
        check_permuted(estimate, batch, random)


@given(batches())
def test_leave_one_out_is_the_centred_return_times_g_over_g_minus_one(batch):
    size = (batch[2][:, None] == batch[2][None, :]).sum(1)
    factor = torch.repeat_interleave(size / (size - 1).clamp(min=1), batch[1])
    assert_close(leave_one_out(*batch), factor * outcome(*batch, scale=False), rtol=1e-9, atol=1e-9)


@given(batches())
def test_timestep_equals_a_loop_over_peers(batch):
    rewards, lengths, group = batch
    to_go = [x.tolist() for x in returns_to_go(rewards, lengths, 0.9).split(lengths.tolist())]
    expected = []
    for i, own in enumerate(to_go):
        peers = [to_go[j] for j in range(len(to_go)) if j != i and group[j] == group[i]]
        for t, g in enumerate(own):
            others = [peer[t] if t < len(peer) else 0.0 for peer in peers]
            expected.append(g - sum(others) / len(others) if others else 0.0)
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(timestep(*batch, gamma=0.9), expected, rtol=1e-9, atol=1e-9)


def test_of_timestep_the_rounding_of_sums_is_no_signal():
    # 0.1 + 0.2 is 0.3 but for rounding, and so is 0.6 in another order
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.1 + (0.2 + 0.3), (0.1 + 0.2) + 0.3], dtype=torch.float64)
    assert rewards[0] != rewards[1]
    assert rewards[2] != rewards[3]
    found = timestep(rewards, torch.ones(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == [0.0] * 4


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_standardise_names_a_number_that_is_not_finite(bad):
    with pytest.raises(TrainingError, match="no batch can be centred with it"):
        standardise(torch.tensor([1.0, 2.0, bad]))
    left_out = standardise(torch.tensor([1.0, 2.0, bad]), torch.tensor([True, True, False]))
    assert left_out[:2].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_batch_returns_of_16_bits_may_sum_to_more_than_they_hold():
    rewards = torch.tensor([6e4] * 4 + [1.0] * 4, dtype=torch.float16)
    found = batch_returns(rewards, torch.tensor([4, 4]), 1.0)
    assert found.dtype == torch.float16
    wanted = batch_returns(rewards.double(), torch.tensor([4, 4]), 1.0)
    torch.testing.assert_close(found.double(), wanted, atol=2e-3, rtol=0)

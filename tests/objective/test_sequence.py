import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grouprl.errors import UsageError
from grouprl.objective import (
    cispo,
    clipped,
    gspo_log_ratio,
    gspo_token_log_ratio,
    importance_logp,
    off_policy_mask,
    outcome,
    ratio,
    sample_mean,
    sapo,
    spo,
)

LEVELS = ["token", "sequence", "sequence_token"]
SURROGATES = [clipped, cispo, sapo, spo]
LENGTHS = torch.tensor([2, 1, 3])


def packed(seed=0, lengths=LENGTHS, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    old, moved = torch.randn(2, int(lengths.sum()), generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return (old + spread * moved).requires_grad_(), old, torch.repeat_interleave(advantages, lengths)


def test_the_sequence_ratio_is_the_geometric_mean_of_the_steps_ratios():
    logp = torch.tensor([1.0, 3.0, -1.0, 0.0, 6.0, 0.0]).requires_grad_()
    old = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    got = gspo_log_ratio(logp, old, LENGTHS)
    assert got.tolist() == [2.0, 2.0, -2.0, 2.0, 2.0, 2.0]
    got[3].backward()  # one step of the last sample moves all of its steps
    assert_close(logp.grad, torch.tensor([0.0, 0.0, 0.0, 1 / 3, 1 / 3, 1 / 3]))


def test_the_token_form_has_the_value_of_the_sequence_and_the_gradient_of_its_step():
    logp = torch.tensor([1.0, 3.0, -1.0, 0.0, 6.0, 0.0]).requires_grad_()
    got = gspo_token_log_ratio(logp, torch.zeros(6), LENGTHS)
    assert got.tolist() == [2.0, 2.0, -1.0, 2.0, 2.0, 2.0]
    got[3].backward()
    assert logp.grad.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_each_level_gives_a_surrogate_the_ratio_it_names():
    logp, old, _ = packed()
    per_sample = torch.stack([x.mean() for x in (logp - old).detach().split(LENGTHS.tolist())]).exp()
    sequence = torch.repeat_interleave(per_sample, LENGTHS)
    expected = {"token": (logp - old).exp().detach(), "sequence": sequence, "sequence_token": sequence}
    for level in LEVELS:
        assert_close(ratio(importance_logp(logp, old, LENGTHS, level), old).detach(), expected[level])


def test_at_the_level_of_turns_a_turn_is_what_a_sample_is_at_that_of_sequences():
    logp, old, _ = packed()
    turns = torch.tensor([1, 1, 1, 2, 1])
    found = importance_logp(logp, old, turns, "turn")
    assert torch.equal(found, importance_logp(logp, old, turns, "sequence"))
    of_turn = (logp - old).detach()[3:5].mean()  # the first two steps of the last sample
    assert_close((found - old).detach()[3:5], torch.stack([of_turn, of_turn]))


def test_at_token_level_nothing_changes():
    logp, old, _ = packed()
    assert importance_logp(logp, old, LENGTHS, "token") is logp


def test_sequence_ratios_of_float32_are_finer_than_gspo_clips():
    lengths = torch.tensor([1000])
    old = torch.full((1000,), -11.0)
    logp = old + 2.0**-16  # 1.5e-5 more likely at each step; -11 in float32 comes in steps of 9.5e-7
    got = ratio(importance_logp(logp, old, lengths, "sequence"), old)
    assert_close(got, torch.full((1000,), math.exp(2.0**-16), dtype=torch.float64), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_the_gradient_is_minus_the_advantage_at_every_level(surrogate, level):
    logp, old, advantages = packed(spread=0.0)
    # at level "sequence" a step's loss moves its whole sample, but advantages are those of samples, so sums agree
    surrogate(importance_logp(logp, old, LENGTHS, level), old, advantages).sum().backward()
    assert_close(logp.grad, -advantages)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 2**31))
def test_sample_mean_weights_give_the_mean_over_samples_of_the_clipped_sequence_ratio(lengths, seed):
    lengths = torch.tensor(lengths)
    logp, old, advantages = packed(seed, lengths, spread=0.5)
    losses = clipped(importance_logp(logp, old, lengths, "sequence"), old, advantages)
    got = (sample_mean(lengths).double() * losses).sum()
    got.backward()
    again = logp.detach().requires_grad_()
    per_sample = []
    for new, before, a in zip(*(x.split(lengths.tolist()) for x in (again, old, advantages)), strict=True):
        s = (new - before).mean().exp()
        per_sample.append(torch.minimum(s * a[0], s.clamp(0.8, 1.2) * a[0]))
    expected = -torch.stack(per_sample).mean()
    expected.backward()
    assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert_close(logp.grad, again.grad, rtol=1e-6, atol=1e-7)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 2**31))
def test_with_one_advantage_per_sample_the_two_sequence_levels_have_the_same_gradient(lengths, seed):
    lengths = torch.tensor(lengths)
    gradients = []
    for level in ("sequence", "sequence_token"):
        logp, old, advantages = packed(seed, lengths, spread=0.5)
        losses = clipped(importance_logp(logp, old, lengths, level), old, advantages)
        (sample_mean(lengths) * losses).sum().backward()
        gradients.append(logp.grad)
    assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_no_gradient_flows_into_the_old_policy(level):
    logp, old = (torch.zeros(6, requires_grad=True) for _ in range(2))
    clipped(importance_logp(logp, old, LENGTHS, level), old, torch.ones(6)).sum().backward()
    assert old.grad is None


def test_samples_of_a_bad_outcome_grown_unlikely_are_dropped_whole():
    old = torch.zeros(8)
    lengths = torch.tensor([2, 2, 2, 2])
    logp = torch.tensor([-3.0, 0.0, -3.0, 0.0, -1.0, 0.0, 3.0, 3.0])  # means of old - new: 1.5, 1.5, 0.5, -3
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    got = off_policy_mask(logp, old, advantages, lengths, delta=0.5)
    assert got.tolist() == [False, False, True, True, True, True, True, True]


def test_steps_of_no_advantage_are_kept():
    got = off_policy_mask(torch.tensor([-9.0, -9.0]), torch.zeros(2), torch.tensor([0.0, -1.0]), torch.tensor([2]), 1.0)
    assert got.tolist() == [True, False]


def test_empty_samples_change_nothing():
    logp, old, advantages = packed()
    lengths = torch.tensor([0, 2, 1, 0, 3])
    assert_close(gspo_log_ratio(logp, old, lengths), gspo_log_ratio(logp, old, LENGTHS))
    group = torch.zeros(3, dtype=torch.int64)
    assert outcome(advantages, LENGTHS, group).shape == importance_logp(logp, old, lengths, "sequence").shape


def test_arguments_that_do_not_fit_are_refused():
    logp, old, advantages = packed()
    with pytest.raises(UsageError, match="logp_old"):
        gspo_log_ratio(logp, old[:1], LENGTHS)
    with pytest.raises(UsageError, match="add up to"):
        importance_logp(logp, old, LENGTHS[:2], "token")
    with pytest.raises(UsageError, match="level must"):
        importance_logp(logp, old, LENGTHS, "sentence")
    with pytest.raises(UsageError, match="delta"):
        off_policy_mask(logp, old, advantages, LENGTHS, delta=0.0)

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grouprl.errors import UsageError
from grouprl.objective import clipped, constant_length, sample_mean, sample_sum, token_mean

LENGTHS = torch.tensor([1, 3])


def test_sample_mean_by_hand():
    assert_close(sample_mean(LENGTHS), torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def test_token_mean_by_hand():
    assert token_mean(LENGTHS).tolist() == [0.25] * 4


def test_constant_length_by_hand():
    assert_close(constant_length(LENGTHS, 10), torch.full((4,), 0.05))


def test_sample_sum_by_hand():
    assert_close(sample_sum(LENGTHS), torch.full((int(LENGTHS.sum()),), 1 / len(LENGTHS)))
    assert_close(sample_sum(LENGTHS, n_samples=8), torch.full((int(LENGTHS.sum()),), 1 / 8))


def test_denominators_may_count_what_is_not_present():
    assert_close(sample_mean(LENGTHS, n_samples=4), torch.tensor([1 / 4, 1 / 12, 1 / 12, 1 / 12]))
    assert_close(constant_length(LENGTHS, 10, n_samples=4), torch.full((4,), 0.025))
    assert_close(token_mean(LENGTHS, n_steps=10), torch.full((4,), 0.1))


def test_parts_of_a_step_with_its_denominators_have_the_weights_of_the_whole():
    lengths, parts = torch.tensor([1, 3, 2]), torch.tensor([1, 3, 2]).split([1, 2])
    assert_close(torch.cat([sample_mean(part, n_samples=3) for part in parts]), sample_mean(lengths))
    assert_close(torch.cat([constant_length(part, 9, n_samples=3) for part in parts]), constant_length(lengths, 9))
    assert_close(torch.cat([token_mean(part, n_steps=6) for part in parts]), token_mean(lengths))


def test_a_denominator_below_what_is_present_is_refused():
    with pytest.raises(UsageError, match="n_samples is 1 but 2"):
        sample_mean(LENGTHS, n_samples=1)
    with pytest.raises(UsageError, match="n_samples is 1 but 2"):
        constant_length(LENGTHS, 9, n_samples=1)
    with pytest.raises(UsageError, match="n_steps is 3 but 4"):
        token_mean(LENGTHS, n_steps=3)


def test_a_mean_over_no_steps_is_refused():
    with pytest.raises(UsageError, match="sample 1 has length 0"):
        sample_mean(torch.tensor([2, 0]))
    with pytest.raises(UsageError, match="no step to weigh"):
        token_mean(torch.tensor([0]))


def test_a_constant_length_must_be_positive():
    with pytest.raises(UsageError, match="length"):
        constant_length(LENGTHS, 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_every_mean_has_weights_that_sum_to_one(lengths):
    packed = torch.tensor(lengths)
    for weights in (sample_mean(packed), token_mean(packed)):
        assert_close(weights.sum(), torch.tensor(1.0))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.lists(st.integers(0, 54), max_size=5),
    st.integers(0, 2**31),
)
def test_the_gradient_is_the_same_for_every_split_into_micro_batches(lengths, cuts, seed):
    packed, generator = torch.tensor(lengths), torch.Generator().manual_seed(seed)
    steps = sum(lengths)
    features = torch.randn(steps, 4, generator=generator, dtype=torch.float64)
    old, advantages = torch.randn(2, steps, generator=generator, dtype=torch.float64)
    edges = [0, *sorted(c for c in cuts if c <= steps), steps]
    for weights in (sample_mean(packed), token_mean(packed), constant_length(packed, 9), sample_sum(packed)):
        gradients = []
        for spans in ([(0, steps)], list(pairwise(edges))):
            theta = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
            for a, b in spans:
                losses = clipped(features[a:b] @ theta, old[a:b], advantages[a:b])
                (weights[a:b] * losses).sum().backward()
            gradients.append(theta.grad)
        assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grouprl.errors import UsageError
from grouprl.objective import discounted_suffix_sum, last_index, position, remaining, segment_ids, segment_sum

LENGTHS = torch.tensor([2, 1, 3])


def test_segment_ids_name_the_sample_of_each_step():
    assert segment_ids(LENGTHS).tolist() == [0, 0, 1, 2, 2, 2]


def test_position_counts_from_zero_in_each_sample():
    assert position(LENGTHS).tolist() == [0, 1, 0, 0, 1, 2]


def test_remaining_counts_down_to_zero_in_each_sample():
    assert remaining(LENGTHS).tolist() == [1, 0, 0, 2, 1, 0]


def test_last_index_is_where_each_sample_ends():
    assert last_index(LENGTHS).tolist() == [1, 2, 5]


def test_segment_sum_adds_each_sample():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert segment_sum(x, LENGTHS).tolist() == [3.0, 4.0, 56.0]
    assert segment_sum(torch.arange(6), LENGTHS).tolist() == [1, 2, 12]


def test_segment_sum_of_many_steps_keeps_float32_accuracy():
    got = segment_sum(torch.full((200_000,), 0.1), torch.tensor([200_000]))
    assert got.item() == pytest.approx(20_000.0, rel=1e-6)


def test_an_empty_sample_has_sum_zero_and_no_steps():
    lengths = torch.tensor([0, 2, 0])
    assert segment_sum(torch.tensor([1.0, 2.0]), lengths).tolist() == [0.0, 3.0, 0.0]
    assert segment_ids(lengths).tolist() == [1, 1]
    assert position(lengths).tolist() == [0, 1]
    assert remaining(lengths).tolist() == [1, 0]


def test_an_empty_sample_has_no_last_index():
    with pytest.raises(UsageError, match="sample 1 has length 0"):
        last_index(torch.tensor([1, 0]))


@pytest.mark.parametrize("lengths", [[2, 2], [7]])
def test_lengths_that_do_not_add_up_to_the_steps_are_refused(lengths):
    with pytest.raises(UsageError, match="add up to"):
        segment_sum(torch.ones(6), torch.tensor(lengths))
    with pytest.raises(UsageError, match="add up to"):
        discounted_suffix_sum(torch.ones(6), torch.tensor(lengths), 0.9)


@pytest.mark.parametrize("lengths", [torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([True])])
def test_lengths_must_be_a_row_of_integers(lengths):
    with pytest.raises(UsageError, match="1-d integer"):
        segment_ids(lengths)


def test_negative_lengths_are_refused():
    with pytest.raises(UsageError, match="negative, got -1"):
        position(torch.tensor([3, -1]))


def test_suffix_sum_by_hand():
    x = torch.tensor([1.0, 2.0, 5.0, 1.0, 2.0, 4.0])
    # 4; 2 + .5*4 = 4; 1 + .5*4 = 3
    assert discounted_suffix_sum(x, LENGTHS, 0.5).tolist() == [2.0, 2.0, 5.0, 3.0, 4.0, 4.0]


def test_suffix_sum_with_discount_zero_is_the_input():
    x = torch.tensor([1.0, 2.0, 5.0, 1.0, 2.0, 4.0])
    assert discounted_suffix_sum(x, LENGTHS, 0.0).tolist() == x.tolist()


def test_an_infinite_neighbour_stays_in_its_own_sample():
    x = torch.tensor([1.0, 2.0, float("inf"), 3.0])
    assert discounted_suffix_sum(x, torch.tensor([2, 1, 1]), 1.0).tolist() == [3.0, 2.0, float("inf"), 3.0]


@pytest.mark.parametrize("discount", [-0.1, 1.1, float("nan")])
def test_a_discount_outside_the_unit_interval_is_refused(discount):
    with pytest.raises(UsageError, match="discount"):
        discounted_suffix_sum(torch.ones(6), LENGTHS, discount)


def test_suffix_sum_leaves_its_input_alone():
    x = torch.ones(6)
    discounted_suffix_sum(x, LENGTHS, 0.9)
    assert x.tolist() == [1.0] * 6


def loop(x, lengths, discount):
    out, end = [], 0
    for n in lengths:
        piece, carry = x[end : end + n], 0.0
        for value in reversed(piece):
            carry = value + discount * carry
            out.insert(end, carry)
        end += n
    return torch.tensor(out, dtype=torch.float64)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
    st.integers(0, 2**31),
)
def test_the_scan_equals_a_loop_in_float64(lengths, discount, seed):
    x = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = discounted_suffix_sum(x, torch.tensor(lengths), discount)
    assert_close(got, loop(x.tolist(), lengths, discount), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("discount", [0.99, 1.0])
def test_the_float32_scan_keeps_float32_accuracy_over_long_samples(discount):
    lengths = [2000, 1, 1023]
    x = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0))
    got = discounted_suffix_sum(x, torch.tensor(lengths), discount)
    assert_close(got.double(), loop(x.double().tolist(), lengths, discount), rtol=1e-6, atol=0.0)


def test_suffix_sum_at_a_step_does_not_depend_on_what_is_packed_around_it():
    x = torch.randn(5, generator=torch.Generator().manual_seed(1))
    alone = discounted_suffix_sum(x, torch.tensor([5]), 0.97)
    beside = discounted_suffix_sum(torch.cat((torch.ones(30), x, torch.ones(3))), torch.tensor([30, 5, 3]), 0.97)
    assert torch.equal(beside[30:35], alone)

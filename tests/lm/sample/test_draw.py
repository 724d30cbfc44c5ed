"""Drawing one token: the distribution, the corners of it, and the filters as transformers has them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grouprl.lm.sample.draw import SamplingSettings, draw, greedy, keep_likely, penalise_repetition

ALMOST_1 = 1.0 - 2.0**-24  # the largest number torch.rand gives
NEVER = -math.inf
SIZES = [1, 2, 97, 255, 256, 257, 512, 1000]


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", SIZES)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    n = 4000
    logits = normal(vocabulary)
    uniform = (torch.arange(n) + 0.5) / n
    token, logp = draw(logits.repeat(n, 1), uniform)
    p = logits.double().softmax(-1)
    cdf = p.cumsum(-1)
    # Where a boundary lies within rounding of the uniform number either side of it is right.
    for side in (uniform.double() - 1e-6, uniform.double() + 1e-6):
        exact = torch.searchsorted(cdf, side, right=True).clamp(max=vocabulary - 1)
        assert float((token != exact).double().mean()) < 0.01
    low = torch.searchsorted(cdf, uniform.double() - 1e-6, right=True)
    high = torch.searchsorted(cdf, uniform.double() + 1e-6, right=True).clamp(max=vocabulary - 1)
    assert bool(((low <= token) & (token <= high)).all())
    torch.testing.assert_close(logp, p.log()[token].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_1])
def test_only_tokens_with_a_probability_are_drawn(vocabulary: int, uniform: float) -> None:
    """One after the other is the only possible one: all corners of all blocks."""
    logits = torch.full((vocabulary, vocabulary), NEVER)
    logits.diagonal().copy_(normal(vocabulary, scale=50.0))
    token, logp = draw(logits, torch.full((vocabulary,), uniform))
    assert token.tolist() == list(range(vocabulary))
    assert logp.tolist() == [0.0] * vocabulary


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 600),
    st.lists(st.tuples(st.integers(0, 599), st.floats(-80.0, 80.0)), min_size=1, max_size=6),
    st.one_of(st.sampled_from([0.0, ALMOST_1]), st.floats(0.0, ALMOST_1)),
)
def test_draws_from_few_tokens_of_any_size_are_possible_and_exactly_scored(vocabulary, some, uniform) -> None:
    logits = torch.full((1, vocabulary), NEVER)
    for place, value in some:
        logits[0, place % vocabulary] = value
    token, logp = draw(logits.clone(), torch.tensor([uniform], dtype=torch.float32).clamp(max=ALMOST_1))
    assert 0 <= int(token) < vocabulary
    assert float(logits[0, int(token)]) > NEVER
    expected = logits.double().log_softmax(-1)[0, int(token)]
    assert float(logp) == pytest.approx(float(expected), abs=1e-5)


def test_the_ends_of_the_unit_interval_are_the_first_and_the_last_token() -> None:
    for vocabulary in SIZES:
        token, _ = draw(torch.zeros(2, vocabulary), torch.tensor([0.0, ALMOST_1]))
        assert token.tolist() == [0, vocabulary - 1]


def test_rounding_does_not_point_past_the_last_token() -> None:
    # A block's float32 sum may exceed the float64 sum within it, and the largest uniform number then lies beyond.
    logits = normal(20_000, 97, scale=1.0)
    logits[:, 60:] = NEVER
    token, logp = draw(logits.clone(), torch.full((20_000,), ALMOST_1))
    assert int(token.max()) == 59
    torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, token[:, None])[:, 0], rtol=0, atol=1e-5)


def test_tokens_too_unlikely_for_float32_are_never_drawn() -> None:
    logits = torch.full((1, 300), -1e4)
    logits[0, 7] = 1e4
    for uniform in (0.0, ALMOST_1):
        token, logp = draw(logits.clone(), torch.tensor([uniform]))
        assert token.item() == 7
        assert logp.item() == 0.0


def test_many_unlikely_tokens_are_drawn_as_often_as_they_should() -> None:
    # 50,000 tokens of 1e-5 each beside one of 1/2: a float32 running sum would lose some.
    vocabulary, n = 50_001, 400
    logits = torch.full((vocabulary,), math.log(1e-5))
    logits[0] = math.log(0.5)
    token, _ = draw(logits.expand(n, -1).clone(), (torch.arange(n) + 0.5) / n)
    exact = torch.where((torch.arange(n) + 0.5) / n < 0.5, 0.0, ((torch.arange(n) + 0.5) / n - 0.5) * 1e5 + 1)
    assert float((token - exact).abs().max()) < 2  # of 50,000


def test_greedy_takes_the_likeliest_with_its_log_probability() -> None:
    logits = normal(5, 97)
    token, logp = greedy(logits.clone())
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-6)


# --- filters ----------------------------------------------------------------------------------------------------------


def kept(logits: torch.Tensor, **how) -> torch.Tensor:
    return keep_likely(logits.clone(), SamplingSettings(8, **how))


NO_IDS = torch.zeros(40, 1, dtype=torch.int64)


@pytest.mark.parametrize("k", [1, 2, 10, 97, 500])
def test_top_k_is_that_of_transformers(k: int) -> None:
    logits = normal(40, 97)
    assert torch.equal(kept(logits, top_k=k), TopKLogitsWarper(k)(NO_IDS, logits.clone()))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p: float) -> None:
    logits = normal(40, 97)
    assert torch.equal(kept(logits, top_p=p), TopPLogitsWarper(p)(NO_IDS, logits.clone()))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_is_that_of_transformers(p: float) -> None:
    logits = normal(40, 97)
    assert torch.equal(kept(logits, min_p=p), MinPLogitsWarper(p)(NO_IDS, logits.clone()))


def test_filters_are_applied_in_the_order_of_transformers() -> None:
    logits = normal(40, 97)
    expected = logits.clone()
    for warper in (TopKLogitsWarper(12), TopPLogitsWarper(0.8), MinPLogitsWarper(0.08)):
        expected = warper(NO_IDS, expected)
    found = kept(logits, top_k=12, top_p=0.8, min_p=0.08)
    assert torch.equal(found, expected)
    by_one = [kept(logits, **{name: value}).isfinite().sum() for name, value in (("top_k", 12), ("top_p", 0.8))]
    assert all(found.isfinite().sum() < n for n in by_one)


def test_the_likeliest_token_stays_whatever_is_filtered() -> None:
    logits = normal(40, 97)
    for how in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        found = kept(logits, **how).isfinite()
        assert bool(found.gather(1, logits.argmax(-1, keepdim=True)).all())
        assert found.sum(-1).tolist() == [1] * 40


def test_by_hand_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.05, 0.25]]).log()
    assert kept(logits, top_p=0.7).isfinite().tolist() == [[False, True, False, True]]
    assert kept(logits, top_p=0.8).isfinite().tolist() == [[True, True, False, True]]
    assert kept(logits, top_p=0.4).isfinite().tolist() == [[False, True, False, False]]


def test_without_filters_nothing_is_left_out() -> None:
    plain = SamplingSettings(8, temperature=0.5, repetition_penalty=1.5, min_new_tokens=3)
    assert not plain.filtered
    logits = normal(40, 97)
    assert torch.equal(keep_likely(logits.clone(), plain), logits)
    assert all(SamplingSettings(8, **how).filtered for how in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}))


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = normal(6, 97)
    ids = torch.randint(97, (6, 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, 97, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalise_repetition(logits, seen, penalty), expected)

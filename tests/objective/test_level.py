import pytest
import torch

from grouprl.errors import UsageError
from grouprl.objective import Level, fit_level, gae


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_batch(gamma=0.95, lam=0.9, terminated=(1, 0, 1, 0), seed=0):
    """Values that should be 1.5 times as large, and higher by 2, but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    lengths, ends = torch.tensor([30, 50, 20, 40]), flags(*terminated)
    values = torch.randn(140, generator=generator) * 3 + 7
    last = torch.randn(4, generator=generator) * 3 + 7
    right, after = 1.5 * values + 2, torch.where(ends, 0.0, 1.5 * last + 2)
    noise = 0.3 * torch.randn(140, generator=generator)
    rewards = noise - gae(torch.zeros(140), right, after, lengths, gamma, 0.0)
    return values, last, rewards, lengths, ends, gamma, lam


def advantages(level, values, last, rewards, lengths, terminated, gamma, lam):
    own = level.scale * values + level.shift
    after = torch.where(terminated, 0.0, level.scale * last + level.shift)
    return gae(rewards, own, after, lengths, gamma, lam), own


def test_a_constant_for_ever_is_worth_its_reward_over_one_minus_gamma():
    # one sample of 2 steps that goes on, reward 1, gamma .5: V = 2 everywhere, whatever the constant V was before
    for lam in (0.0, 0.7, 1.0):
        level = fit_level(doubles(5.0, 5.0), doubles(5.0), doubles(1.0, 1.0), torch.tensor([2]), flags(0), 0.5, lam)
        assert level.scale == 1.0
        assert level.shift == pytest.approx(-3.0, abs=1e-12)


def test_scale_and_level_of_two_states_by_hand():
    # Two steps, then an end, gamma 1/2, lambda 0, rewards 3 and 4. V = 1, 2, so Z = [1 1; 2 1], M = [1 1/2; 0 0].
    # Z - M = [0 1/2; 2 1], Z'(Z - M) = [4 5/2; 2 3/2], Z'b = [11, 7]:
    # c = (11 * 3/2 - 5/2 * 7) / (4 * 3/2 - 5/2 * 2) = -1, which is not believed. With c = 1
    # 2 + 3/2 a = 7 gives a = 10/3.
    case = (doubles(1.0, 2.0), doubles(9.0), doubles(3.0, 4.0), torch.tensor([2]), flags(1), 0.5, 0.0)
    assert fit_level(*case) == pytest.approx(Level(1.0, 10 / 3), rel=1e-12)
    # Rewards 1/2 and 8: b = Z'b = [16.5, 8.5]: c = (16.5 * 1.5 - 2.5 * 8.5) / 1 = 3.5,
    # a = (4 * 8.5 - 2 * 16.5) / 1 = 1. Check: V = 4.5, 8, and indeed 8 = r_2 and 4.5 = 1/2 + 8/2.
    case = (doubles(1.0, 2.0), doubles(9.0), doubles(0.5, 8.0), torch.tensor([2]), flags(1), 0.5, 0.0)
    assert fit_level(*case) == pytest.approx(Level(3.5, 1.0), rel=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_advantages_then_have_mean_0_and_say_nothing_of_the_values(lam, seed):
    case = random_batch(lam=lam, seed=seed)
    before, _ = advantages(Level(1.0, 0.0), *case)
    assert abs(float(before.mean())) > 0.05
    level = fit_level(*case)
    after, values = advantages(level, *case)
    assert level == pytest.approx((1.5, 2.0), rel=0.3)
    assert float(after.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(((values - values.mean()) * after).mean()) == pytest.approx(0.0, abs=1e-4)


def test_values_that_are_right_stay_as_they_are():
    # A chain of three steps at gamma .5, rewards 1, 2, 3, is worth 2.75, 3.5 and 3 (and its copy, cut, 1 step earlier).
    values, rewards = doubles(2.75, 3.5, 3.0, 2.75, 3.5), doubles(1.0, 2.0, 3.0, 1.0, 2.0)
    case = (values, doubles(-7.0, 3.0), rewards, torch.tensor([3, 2]), flags(1, 0), 0.5, 0.8)
    assert fit_level(*case) == pytest.approx(Level(1.0, 0.0), abs=1e-12)
    # doubled and shifted values are put back
    wrong = (2 * values + 5, doubles(-7.0, 2 * 3.0 + 5), *case[2:])
    assert fit_level(*wrong) == pytest.approx(Level(0.5, -2.5), rel=1e-9)


def test_what_follows_a_termination_does_not_count():
    values, last, *rest = random_batch(terminated=(1, 1, 0, 0))
    other = last.clone()
    other[:2] = 1e6
    assert fit_level(values, other, *rest) == fit_level(values, last, *rest)


def test_a_batch_that_says_nothing_of_level_or_scale_leaves_them():
    values, last, rewards, lengths, _, _, lam = random_batch()
    assert fit_level(values, last, rewards, lengths, flags(0, 0, 0, 0), 1.0, lam) == Level(1.0, 0.0)
    flat = fit_level(
        torch.full_like(values, 4.0), torch.full_like(last, 4.0), rewards, lengths, flags(1, 0, 1, 0), 0.95, lam
    )
    assert flat.scale == 1.0
    nothing = torch.zeros(0)
    assert fit_level(nothing, nothing, nothing, nothing.long(), nothing.bool(), 0.9, 0.9) == Level(1.0, 0.0)
    assert fit_level(values * torch.nan, last, rewards, lengths, flags(1, 0, 1, 0), 0.9, 0.9) == Level(1.0, 0.0)


def test_it_keeps_its_digits_far_from_0():
    values, last, *rest = random_batch()
    near = fit_level(values, last, *rest)
    far = fit_level(values.double() + 1e5, last.double() + 1e5, *rest)
    assert far.scale == pytest.approx(near.scale, rel=1e-6)
    assert far.shift + far.scale * 1e5 == pytest.approx(near.shift, rel=1e-4)


def test_shapes_and_discounts_that_do_not_fit_are_refused():
    values, last, rewards, lengths, terminated, gamma, lam = random_batch()
    with pytest.raises(UsageError, match="values has shape"):
        fit_level(values[1:], last, rewards, lengths, terminated, gamma, lam)
    with pytest.raises(UsageError, match="last_values has shape"):
        fit_level(values, last[1:], rewards, lengths, terminated, gamma, lam)
    with pytest.raises(UsageError, match="gamma and lam"):
        fit_level(values, last, rewards, lengths, terminated, 1.1, lam)

import pytest
import torch
from torch.testing import assert_close

from grouprl.errors import TrainingError, UsageError
from grouprl.objective import (
    LOSSES,
    Fixed,
    Objective,
    effective_share,
    importance_weights,
    policy_loss,
    standardise,
    standardise_weighted,
)
from grouprl.objective.losses import names as loss_names


def every(n):
    return torch.ones(n, dtype=torch.bool)


def test_a_weight_is_the_ratio_of_probabilities_up_to_its_bound():
    now, then = torch.tensor([0.3, 0.1, 0.9, 0.0]).log(), torch.tensor([0.6, 0.1, 0.1, 0.5]).log()
    assert_close(importance_weights(now, then), torch.tensor([0.5, 1.0, 2.0, 0.0]))
    assert_close(importance_weights(now, then, largest=1.5), torch.tensor([0.5, 1.0, 1.5, 0.0]))
    assert importance_weights(torch.tensor([500.0]), torch.tensor([-500.0])).tolist() == [2.0]  # exp overflows


def test_the_effective_share_by_hand():
    assert effective_share(torch.tensor([1.0, 1.0, 2.0])) == pytest.approx(16 / 18)
    assert effective_share(torch.full((7,), 0.3)) == pytest.approx(1.0)
    assert effective_share(torch.tensor([0.0, 0.0, 0.0, 5.0])) == 0.25
    assert effective_share(torch.zeros(3)) == 0.0


def test_weighted_advantages_by_hand():
    # mean (0 + 2 + 2 * 6) / 4 = 3.5; sum w (A - mean)^2 = 12.25 + 2.25 + 12.5 = 27; over 4 - 6/4 = 2.5 is 10.8
    made = standardise_weighted(torch.tensor([0.0, 2.0, 6.0]), torch.tensor([1.0, 1.0, 2.0]), every(3))
    assert_close(made, torch.tensor([-3.5, -1.5, 5.0]) / 10.8**0.5)


def test_with_weights_of_1_it_is_standardise():
    raw, where = torch.randn(50, generator=torch.Generator().manual_seed(0)), every(50)
    where[::7] = False
    assert_close(standardise_weighted(raw, torch.ones(50), where), standardise(raw, where))


def test_steps_that_are_left_out_or_weigh_nothing_move_no_other():
    raw, weights, where = torch.tensor([0.0, 2.0, 6.0, 99.0, -77.0]), torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0]), every(5)
    where[3] = False
    made = standardise_weighted(raw, weights, where)
    assert_close(made[:3], torch.tensor([-3.5, -1.5, 5.0]) / 10.8**0.5)
    assert made[4].item() == 0.0


def test_equal_advantages_and_weights_of_one_step_give_exactly_0():
    equal = torch.full((4,), 0.1)
    assert standardise_weighted(equal, torch.tensor([0.5, 1.0, 1.3, 2.0]), every(4)).tolist() == [0.0] * 4
    raw = torch.tensor([1.0, 2.0])
    assert standardise_weighted(raw, torch.tensor([0.0, 2.0]), every(2)).tolist() == [0.0, 0.0]
    assert standardise_weighted(raw, torch.zeros(2), every(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("delta", [None, 3.0])
@pytest.mark.parametrize("name", loss_names(environments=True))
def test_a_weight_in_the_advantage_weighs_the_loss_of_its_step(name, delta):
    generator = torch.Generator().manual_seed(0)
    logp, old = (-3 * torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(2))
    a, w = (torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(2))
    w = w.abs()
    high = 1.5 if LOSSES[name].cap else None
    objective = Objective(loss_type=name, delta=delta, epsilon_high=high)
    one, other = (policy_loss(objective, logp, Fixed(x, 1.0, old)) for x in (a, w * a))
    assert_close(other.surrogate, w * one.surrogate)
    assert other.cut is None or all(map(torch.equal, other.cut, one.cut))


def test_shapes_that_do_not_fit_are_refused():
    x = torch.zeros(3)
    with pytest.raises(UsageError, match="one shape"):
        importance_weights(x, x[:2])
    with pytest.raises(UsageError, match="largest must be above 0"):
        importance_weights(x, x, largest=0.0)
    with pytest.raises(UsageError, match="one shape"):
        standardise_weighted(x, x[:2], every(3))
    with pytest.raises(UsageError, match="boolean"):
        standardise_weighted(x, x, x)


def test_what_both_policies_never_do_weighs_nothing_and_no_infinity_is_centred():
    never = torch.tensor([-torch.inf, -torch.inf, -1.0])
    assert importance_weights(never, torch.tensor([-torch.inf, -1.0, -torch.inf])).tolist() == [0.0, 0.0, 2.0]
    everywhere = torch.ones(3, dtype=torch.bool)
    with pytest.raises(TrainingError, match="no batch can be centred with it"):
        standardise_weighted(torch.tensor([1.0, 2.0, torch.inf]), torch.ones(3), everywhere)

"""The tables that configurations read, and the one loss of both arenas."""

import math

import pytest
import torch

from grouprl.errors import TrainingError
from grouprl.objective import DIVERGENCES, ESTIMATORS, LOSSES, Fixed, Objective, estimators, losses, policy_loss
from grouprl.objective.estimators import Estimation


def test_the_loss_is_surrogate_plus_divergence_less_entropy_by_hand() -> None:
    logp = torch.tensor([0.0, math.log(1.5), math.log(0.5)], dtype=torch.float64, requires_grad=True)
    old, a = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    kl, entropy = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    terms = policy_loss(Objective(beta=2.0, entropy_coef=0.1), logp, Fixed(a, weights, old), entropy=entropy, kl=kl)
    # surrogates -1, -min(3, 2.4) and -min(-.5, -.8) = .8
    assert terms.surrogate.tolist() == pytest.approx([-1.0, -2.4, 0.8])
    wanted = 0.5 * (-1 + 0.2 - 0.1) + 0.25 * (-2.4 + 0.4 - 0.05) + 0.25 * (0.8 + 0.6)
    assert float(terms.loss) == pytest.approx(wanted)
    assert terms.cut is not None
    low, high = terms.cut
    assert (low.tolist(), high.tolist()) == ([False, False, True], [False, True, False])
    terms.loss.backward()
    assert logp.grad.tolist() == pytest.approx([-0.5, 0.0, 0.0])


def test_a_sampled_divergence_comes_from_the_reference() -> None:
    logp, ref = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5])
    terms = policy_loss(Objective(beta=0.5, kl_estimator="k2"), logp, Fixed(torch.zeros(1), 1.0, None, ref))
    assert terms.kl.tolist() == [0.125]  # .5 squared over 2
    assert float(terms.loss) == pytest.approx(0.0625)
    terms.loss.backward()
    assert logp.grad.tolist() == [0.25]


def test_the_losses_of_parts_add_up_to_the_loss_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, old, a, weights = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(4))
    lengths = torch.tensor([2, 4, 3, 3])
    for name, loss in LOSSES.items():
        objective = Objective(
            loss_type=name, epsilon_high=1.5 if loss.cap else None,
            importance_sampling_level=loss.levels[0],
        )  # fmt: skip
        logp_, old_ = -logp.abs(), -old.abs()
        whole = policy_loss(objective, logp_, Fixed(a, weights, old_, None, lengths)).loss
        halves = [
            policy_loss(objective, logp_[s], Fixed(a[s], weights[s], old_[s], None, part)).loss
            for s, part in ((slice(0, 6), lengths[:2]), (slice(6, 12), lengths[2:]))
        ]
        torch.testing.assert_close(sum(halves), whole)


def test_a_surrogate_of_ones_own_takes_the_place_of_the_named_one() -> None:
    def plain(logp, old, advantages):
        return -(logp - old).exp() * advantages

    logp = torch.tensor([math.log(2.0)])
    fixed = Fixed(torch.ones(1), 1.0, torch.zeros(1))
    terms = policy_loss(Objective(surrogate_function=plain), logp, fixed)
    assert float(terms.loss) == pytest.approx(-2.0)  # dapo clips at 1.2
    assert terms.cut is None
    with pytest.raises(TrainingError, match="surrogate_function returned shape"):
        policy_loss(Objective(surrogate_function=lambda logp, old, a: a.sum()), logp, fixed)


def test_on_policy_nothing_is_counted_as_cut() -> None:
    logp = torch.tensor([-0.1, -5.0])
    assert policy_loss(Objective(), logp, Fixed(torch.ones(2), 0.5)).cut is None


@pytest.mark.parametrize("table", [LOSSES, ESTIMATORS, DIVERGENCES])
def test_every_entry_says_what_it_is(table) -> None:
    assert all(entry.about for entry in table.values())
    assert len({entry.about for entry in table.values()}) >= len(table) - 1  # one is another with gamma 1


@pytest.mark.parametrize("name", [name for name, entry in ESTIMATORS.items() if entry.function is not None])
def test_an_entry_says_whether_it_discounts(name: str) -> None:
    entry, lengths, group = ESTIMATORS[name], torch.tensor([2, 3, 2]), torch.zeros(3, dtype=torch.int64)
    rewards, states = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0, 2.0, 5.0]), torch.tensor([0, 1, 0, 1, 2, 0, 1])
    made = [entry.function(rewards, lengths, group, Estimation(gamma, states=states)) for gamma in (1.0, 0.5)]
    assert entry.discounted != torch.equal(*made)


def test_environments_offer_what_single_steps_can_have() -> None:
    assert losses.names(environments=True) == ("grpo", "dapo", "cispo", "sapo", "spo", "dppo_tv", "dppo_kl")
    assert set(losses.names(environments=False)) == set(LOSSES)
    assert "baseline" not in estimators.names(environments=False)
    assert "reinforce_pp" not in estimators.names(environments=True)

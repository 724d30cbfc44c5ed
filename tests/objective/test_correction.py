import math

import pytest
import torch
from torch.testing import assert_close

from grouprl.errors import UsageError
from grouprl.objective import Fixed, Objective, policy_loss, sampler_correction

LENGTHS = torch.tensor([2, 1, 3])
LOG2 = math.log(2.0)
# Ratios of the tokens: 2, 4 | 1/2 | 1, 8, 1/4. Of the samples: 8, 1/2, 2.
SAMPLED = torch.tensor([-1.0, -2.0, -1.0, -3.0, -4.0, -0.5])
LOGP = SAMPLED + LOG2 * torch.tensor([1.0, 2.0, -1.0, 0.0, 3.0, -2.0])


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, None, [2, 4, 0.5, 1, 8, 0.25]),
        ("token_truncate", None, 3.0, [2, 3, 0.5, 1, 3, 0.25]),
        ("token_truncate", 0.75, 3.0, [2, 3, 0.75, 1, 3, 0.75]),
        ("token_truncate", 0.75, None, [2, 4, 0.75, 1, 8, 0.75]),
        ("token_mask", None, 3.0, [2, 0, 0.5, 1, 0, 0.25]),
        ("token_mask", 0.3, 3.0, [2, 0, 0.5, 1, 0, 0]),
        ("token_mask", 0.3, None, [2, 4, 0.5, 1, 8, 0]),
        ("sequence_truncate", None, None, [8, 8, 0.5, 2, 2, 2]),
        ("sequence_truncate", None, 3.0, [3, 3, 0.5, 2, 2, 2]),
        ("sequence_truncate", 0.75, 3.0, [3, 3, 0.75, 2, 2, 2]),
        ("sequence_mask", None, 3.0, [0, 0, 0.5, 2, 2, 2]),
        ("sequence_mask", 0.75, 3.0, [0, 0, 0, 2, 2, 2]),
        ("sequence_mask", 0.75, None, [8, 8, 0, 2, 2, 2]),
    ],
)
def test_ratios_of_tokens_and_samples_are_cut_off_at_their_bounds_or_masked_beyond_them(mode, low, high, expected):
    found = sampler_correction(LOGP, SAMPLED, LENGTHS, mode, low, high)
    assert_close(found, torch.tensor([float(x) for x in expected]))


def test_a_ratio_at_a_bound_is_within():
    logp = torch.tensor([1.0, 1.0])  # both ratios are exactly 1
    assert sampler_correction(logp, logp, torch.tensor([1, 1]), "token_mask", 1.0, 1.0).tolist() == [1.0, 1.0]


def test_no_gradient_flows_through_the_correction():
    logp = LOGP.clone().requires_grad_()
    assert not sampler_correction(logp, SAMPLED, LENGTHS, "token_truncate").requires_grad


def test_what_cannot_be_a_correction_is_refused():
    with pytest.raises(UsageError, match='mode must be "token_truncate"'):
        sampler_correction(LOGP, SAMPLED, LENGTHS, "turn_mask")
    with pytest.raises(UsageError, match=r"lower bound 2\.0 .* above the upper bound 1\.0"):
        sampler_correction(LOGP, SAMPLED, LENGTHS, "token_mask", 2.0, 1.0)
    with pytest.raises(UsageError, match="logp_sampled has shape"):
        sampler_correction(LOGP, SAMPLED[:5], LENGTHS, "token_mask")


def test_the_loss_multiplies_surrogates_and_their_gradient():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    fixed = Fixed(
        torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]), logp_old=logp.detach(), correction=torch.tensor([3.0, 0.0])
    )
    terms = policy_loss(Objective(), logp, fixed)
    assert terms.surrogate.tolist() == [-3.0, 0.0]
    terms.loss.backward()
    assert terms.loss.item() == -1.5
    assert logp.grad.tolist() == [-1.5, 0.0]


def test_the_loss_does_not_multiply_the_divergence():
    logp = torch.tensor([-1.0, -2.0])
    fixed = Fixed(
        torch.zeros(2), torch.tensor([0.5, 0.5]), logp_old=logp, logp_ref=torch.tensor([-1.0, -2.0 + LOG2]),
        correction=torch.tensor([3.0, 0.0]),
    )  # fmt: skip
    # k1 of the second token is -log 2, whatever its correction: 0.5 * 0.1 * -log 2
    assert policy_loss(Objective(beta=0.1, kl_estimator="k1"), logp, fixed).loss.item() == pytest.approx(-0.05 * LOG2)

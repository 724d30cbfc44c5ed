"""Discounted returns and generalised advantages over packed steps."""

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.packed import (
    check_floats,
    check_packed,
    check_per_sample,
    discounted_suffix_sum,
    remaining,
    segment_ids,
)


def returns_to_go(rewards: Tensor, lengths: Tensor, gamma: float, bootstrap: Tensor | None = None) -> Tensor:
    """[S]: G_t = sum_{k >= t} gamma^(k-t) r_k + gamma^(n-t) bootstrap, within each sample of n steps (t = 0..n-1).

    rewards [S]; bootstrap [N] is the value expected after a sample's last step, 0 for a terminated one (default: 0).
    Raises UsageError on shapes that do not fit, integer tensors or gamma outside [0, 1].
    """
    check_packed(lengths, rewards=rewards)
    check_floats(rewards=rewards)
    if bootstrap is None:
        return discounted_suffix_sum(rewards, lengths, gamma)
    check_per_sample(lengths, bootstrap=bootstrap)
    check_floats(bootstrap=bootstrap)
    at_last = remaining(lengths) == 0
    after = torch.where(at_last, bootstrap.to(rewards.dtype)[segment_ids(lengths)], 0.0)
    return discounted_suffix_sum(rewards + gamma * after, lengths, gamma)


def gae(rewards: Tensor, values: Tensor, last_values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """[S]: generalised advantages A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t.

    rewards, values [S]; last_values [N] is V after a sample's last step: 0 where the episode terminated, the value of
    the state reached where it was truncated or the batch was cut. lam = 1 gives return-to-go minus value.
    Source: Schulman et al. 2016, arXiv 1506.02438, equation 16.
    Raises UsageError on shapes that do not fit, integer tensors, or gamma or lam outside [0, 1].
    """
    check_packed(lengths, rewards=rewards, values=values)
    check_per_sample(lengths, last_values=last_values)
    check_floats(rewards=rewards, values=values, last_values=last_values)
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise UsageError(f"gamma and lam must lie in [0, 1], got gamma={gamma}, lam={lam}.")
    following = values.roll(-1)
    ends = last_values.to(values.dtype)[segment_ids(lengths)]
    following = torch.where(remaining(lengths) == 0, ends, following)
    return discounted_suffix_sum(rewards + gamma * following - values, lengths, gamma * lam)

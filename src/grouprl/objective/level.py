"""The level and the scale of values that were fitted in another way, set so that they are right on average.

The sweeps of the closed-form baseline each bring a constant error of the values down by the factor
gamma (1 - lambda) / (1 - gamma lambda) only, .83 for .99 and .95. Centring advantages hides such an error everywhere
but before a termination, which is worth exactly 0: where the level lags behind, falls look better than they are.
Source: LSTD(lambda), Boyan 2002, Technical update: least-squares temporal difference learning; here in two dimensions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.packed import check_packed, check_per_sample, discounted_suffix_sum, remaining, segment_ids

_LEAST_OPEN = 1e-6
"""Share of a value, on average, that its own targets must leave open, to say anything about the level."""
_LEAST_SPREAD = 1e-12
"""Variance of the values, over their mean square, below which they have no scale to be set."""
_SCALES = (0.2, 5.0)
"""Least and largest scale that is believed; beyond, the batch says too little of it."""


class Level(NamedTuple):
    """V becomes ``scale`` V + ``shift``."""

    scale: float
    shift: float


@torch.no_grad()
def fit_level(
    values: Tensor,
    last_values: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    terminated: Tensor,
    gamma: float,
    lam: float,
) -> Level:
    """The (c, a) with which c V + a is the least-squares fit, in V and a constant, of its own lambda-returns.

    values, rewards [S]: V of each step and its reward; lengths [N]; last_values [N]: V after each sample's last step;
    terminated [N] bool: nothing follows there, whatever last_values holds.

    With Z = [V, 1] of S rows, the lambda-returns of Z theta, theta = (c, a), are linear in theta: y = b + M theta,
        b_t = sum_k (gamma lam)^k r_{t+k},   M_t = sum_k (gamma lam)^k D_{t+k}   within each sample,
        D_t = gamma (1 - lam) Z_{t+1}, at a sample's last step gamma Z of the state after it, 0 where it terminated.
    Z'(y - Z theta) = 0 gives theta = (Z'(Z - M))^-1 Z'b. Its second row says that the advantages y - Z theta of the
    batch have mean 0. Where the scale cannot be told (V does not vary, or c is not in .2 to 5), c is 1 and the level
    alone is set, by the second row. Where that says nothing either (gamma 1 and no end), V stays as it is: (1, 0).

    Raises UsageError on shapes that do not fit, or gamma or lam outside [0, 1].
    """
    check_packed(lengths, values=values, rewards=rewards)
    check_per_sample(lengths, last_values=last_values, terminated=terminated)
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise UsageError(f"gamma and lam must lie in [0, 1], got gamma={gamma}, lam={lam}.")
    total = values.shape[0]
    if total == 0:
        return Level(1.0, 0.0)
    v, after = values.to("cpu", torch.float64), last_values.to("cpu", torch.float64)
    lengths, goes_on = lengths.cpu(), (~terminated.cpu()).double()
    middle = float(v.mean())  # V less a constant spans the same with the constant, and rounds less
    known = discounted_suffix_sum(rewards.to("cpu", torch.float64), lengths, gamma * lam)
    at_end, sample = remaining(lengths) == 0, segment_ids(lengths)

    def own_targets(of_steps: Tensor, of_ends: Tensor) -> Tensor:
        """A column of M [S]."""
        following = torch.where(at_end, gamma * (of_ends * goes_on)[sample], gamma * (1.0 - lam) * of_steps.roll(-1))
        return discounted_suffix_sum(following, lengths, gamma * lam)

    shape, ones = v - middle, torch.ones_like(v)
    open_shape = shape - own_targets(shape, after - middle)
    open_level = ones - own_targets(ones, torch.ones_like(after))
    level_of_shape, level_of_ones = float(open_shape.mean()), float(open_level.mean())
    if not level_of_ones > _LEAST_OPEN:
        return Level(1.0, 0.0)
    reward = float(known.mean())
    if float(shape.square().mean()) > _LEAST_SPREAD * float(v.square().mean()):
        a, b, r = (float(shape @ x) / total for x in (open_shape, open_level, known))
        determinant = a * level_of_ones - b * level_of_shape
        if determinant != 0.0:
            scale = (r * level_of_ones - b * reward) / determinant
            if _SCALES[0] < scale < _SCALES[1]:
                level = (reward - level_of_shape * scale) / level_of_ones
                return _finite(Level(scale, level - scale * middle))
    return _finite(Level(1.0, (reward - level_of_shape) / level_of_ones - middle))


def _finite(level: Level) -> Level:
    return level if all(map(math.isfinite, level)) else Level(1.0, 0.0)

"""What the groups of a batch say about its samples: the statistics that the advantages are made of.

A group is a set of samples that may be compared: same prompt, same initial state, or the whole batch. Group ids are any
integers; the samples of a group need not be neighbours.

Equal returns carry no information, so a group (or batch) whose returns are all equal gets advantages of exactly 0.
"Equal" means: closer than the rounding of the rewards they were summed from. Otherwise 0.1 + 0.2 against 0.3 would be
a difference, and dividing by its standard deviation would blow a rounding error up to the size of a signal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.objective.packed import (
    accumulator_dtype,
    check_floats,
    check_packed,
    check_per_sample,
    segment_ids,
    segment_sum,
)


class Groups(NamedTuple):
    """Returns of the samples and what their groups say about them; statistics are repeated per sample, all [N]."""

    returns: Tensor  # in the accumulator's precision
    ids: Tensor  # 0..P-1
    size: Tensor
    mean: Tensor
    rounding: Tensor  # returns of the group that differ by no more than this are equal
    degenerate: Tensor  # bool: all returns of the group are equal

    def std(self, ddof: int) -> Tensor:
        """[N]: standard deviation of the returns of each sample's group, dividing by G - ddof; 0 for a group of one."""
        squares = torch.zeros_like(self.returns).index_add(0, self.ids, (self.returns - self.mean).square())[self.ids]
        return (squares / (self.size - ddof).clamp(min=1)).sqrt()


def relative_rounding(x: Tensor) -> float:
    """How far two numbers kept in x's type may lie apart, relative to their size, and still be meant as equal."""
    # Rewards kept in 16 bits are mostly small integers, exact there; their own epsilon would call 200 and 201 equal.
    return min(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)


def check_ddof(ddof: int) -> None:
    """Raise UsageError unless ddof is 0 or 1."""
    if ddof not in (0, 1):
        raise UsageError(f"ddof must be 0 (divide by G) or 1 (divide by G - 1), got {ddof}.")


LARGEST_RETURN = 1e18
"""Of what is larger, float32 cannot hold the square; no estimator has use for it."""


def group_returns(rewards: Tensor, lengths: Tensor, group: Tensor) -> Groups:
    """Sum the rewards [S] of each sample and describe its group.

    Raises UsageError on shapes that do not fit or integer rewards, TrainingError on non-finite returns.
    """
    check_packed(lengths, rewards=rewards)
    check_per_sample(lengths, group=group)
    check_floats(rewards=rewards)
    wide = rewards.to(accumulator_dtype(rewards))
    returns = segment_sum(wide, lengths)
    fine = returns.abs() <= LARGEST_RETURN  # nor is NaN
    if not bool(fine.all()):
        sample = int((~fine).nonzero()[0])
        raise TrainingError(
            f"sample {sample} has return {float(returns[sample])}; rewards must be finite numbers, returns at most "
            f"{LARGEST_RETURN:g}; scale the rewards."
        )
    return compare(returns, segment_sum(wide.abs(), lengths), group, relative_rounding(rewards))


def compare(returns: Tensor, sizes: Tensor, group: Tensor, rounding: float) -> Groups:
    """Describe the groups of returns [N] that are sums of rewards.

    sizes [N] are the sums of the absolute values of these rewards, and rounding is that of one reward, relatively: a
    stored reward is off by at most eps/2 |r|, so two equal returns by at most eps times the sum of |r|.
    """
    _, ids, count = torch.unique(group, return_inverse=True, return_counts=True)
    zero = torch.zeros(count.shape[0], dtype=returns.dtype, device=returns.device)
    size = count[ids]
    mean = zero.index_add(0, ids, returns)[ids] / size
    highest = zero.scatter_reduce(0, ids, returns, "amax", include_self=False)
    lowest = zero.scatter_reduce(0, ids, returns, "amin", include_self=False)
    equal = rounding * zero.scatter_reduce(0, ids, sizes, "amax", include_self=False)
    return Groups(returns, ids, size, mean, equal[ids], (highest - lowest <= equal)[ids])


def per_step(per_sample: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """[S]: the number of each sample [N] at every one of its steps."""
    return per_sample.to(dtype)[segment_ids(lengths)]

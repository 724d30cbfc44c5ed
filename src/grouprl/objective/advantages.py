"""Group-relative advantages that need no value function: (rewards [S], lengths [N], group [N]) -> advantages [S].

A group is a set of samples that may be compared: same prompt, same initial state, or the whole batch. Group ids are any
integers; the samples of a group need not be neighbours.

Equal returns carry no information, so a group (or batch) whose returns are all equal gets advantages of exactly 0.
"Equal" means: closer than the rounding of the rewards they were summed from. Otherwise 0.1 + 0.2 against 0.3 would be
a difference, and dividing by its standard deviation would blow a rounding error up to the size of a signal.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.objective.packed import (
    accumulator_dtype,
    check_packed,
    check_per_sample,
    position,
    segment_ids,
    segment_sum,
)
from grouprl.objective.returns import returns_to_go


class _Groups(NamedTuple):
    """Returns of the samples and what their groups say about them; statistics are repeated per sample, all [N]."""

    returns: Tensor  # in the accumulator's precision
    ids: Tensor  # 0..P-1
    size: Tensor
    mean: Tensor
    degenerate: Tensor  # bool: all returns of the group are equal


def _rounding(x: Tensor) -> float:
    # Rewards kept in 16 bits are mostly small integers, exact there; their own epsilon would call 200 and 201 equal.
    return min(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)


def _groups(rewards: Tensor, lengths: Tensor, group: Tensor) -> _Groups:
    check_packed(lengths, rewards=rewards)
    check_per_sample(lengths, group=group)
    if not rewards.is_floating_point():
        raise UsageError(f"rewards must be a floating-point tensor, got {rewards.dtype}; convert with .float().")
    wide = rewards.to(accumulator_dtype(rewards))
    returns = segment_sum(wide, lengths)
    if not bool(torch.isfinite(returns).all()):
        sample = int((~torch.isfinite(returns)).nonzero()[0])
        raise TrainingError(f"sample {sample} has return {float(returns[sample])}; rewards must be finite numbers.")
    _, ids, count = torch.unique(group, return_inverse=True, return_counts=True)
    zero = torch.zeros(count.shape[0], dtype=wide.dtype, device=wide.device)
    size = count[ids]
    mean = zero.index_add(0, ids, returns)[ids] / size
    highest = zero.scatter_reduce(0, ids, returns, "amax", include_self=False)
    lowest = zero.scatter_reduce(0, ids, returns, "amin", include_self=False)
    # A stored reward is off by at most eps/2 |r|, so two equal returns by at most eps times the sum of |r|.
    scale = zero.scatter_reduce(0, ids, segment_sum(wide.abs(), lengths), "amax", include_self=False)
    degenerate = (highest - lowest <= _rounding(rewards) * scale)[ids]
    return _Groups(returns, ids, size, mean, degenerate)


def _per_step(per_sample: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    return per_sample.to(like.dtype)[segment_ids(lengths)]


def outcome(
    rewards: Tensor, lengths: Tensor, group: Tensor, scale: bool = True, eps: float = 1e-8, ddof: int = 1
) -> Tensor:
    """[S]: A_it = (R_i - mean_g R) / (std_g R + eps) at every step t of sample i; R_i = sum of its rewards.

    scale=False leaves the division out (Dr. GRPO). The standard deviation divides by G - ddof. Equal returns and groups
    of one give exactly 0. Sources: GRPO with outcome rewards, arXiv 2402.03300 section 4.1.2; Dr. GRPO, 2503.20783.
    Raises UsageError on shapes that do not fit or ddof other than 0 or 1, TrainingError on non-finite returns.
    """
    if ddof not in (0, 1):
        raise UsageError(f"ddof must be 0 (divide by G) or 1 (divide by G - 1), got {ddof}.")
    g = _groups(rewards, lengths, group)
    advantages = g.returns - g.mean
    if scale:
        squares = torch.zeros_like(g.returns).index_add(0, g.ids, advantages.square())[g.ids]
        advantages = advantages / ((squares / (g.size - ddof).clamp(min=1)).sqrt() + eps)
    return _per_step(torch.where(g.degenerate, 0.0, advantages), lengths, rewards)


def leave_one_out(rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
    """[S]: A_it = R_i - mean_{j != i} R_j = G/(G-1) (R_i - mean_g R) at every step of sample i.

    The baseline does not depend on the sample it is subtracted from, so the policy gradient stays unbiased. A group of
    one has nothing to compare with: exactly 0, as have equal returns. Source: RLOO, arXiv 2402.14740.
    Raises UsageError on shapes that do not fit, TrainingError on non-finite returns.
    """
    g = _groups(rewards, lengths, group)
    advantages = (g.returns - g.mean) * (g.size / (g.size - 1).clamp(min=1))
    return _per_step(torch.where(g.degenerate, 0.0, advantages), lengths, rewards)


def timestep(rewards: Tensor, lengths: Tensor, group: Tensor, gamma: float = 1.0, leave_one_out: bool = True) -> Tensor:
    """[S]: A_it = G_it - mean over the group's other samples of G_jt, at the same step t; ended samples count as 0.

    G is the discounted return-to-go without bootstrap. leave_one_out=False takes the mean over all samples, i included,
    which shrinks the advantage by (G-1)/G. Groups of one, and steps where the whole group has the same return-to-go,
    give exactly 0. Sources: GR2PO, arXiv 2609.19850; GPG, 2510.03679.
    Raises UsageError on shapes that do not fit, TrainingError on non-finite returns.
    """
    g = _groups(rewards, lengths, group)
    to_go = returns_to_go(rewards.to(g.returns.dtype), lengths, gamma)
    sample, time = segment_ids(lengths), position(lengths)
    longest = int(lengths.max()) if lengths.numel() else 0
    cell = g.ids[sample] * longest + time
    size = g.size[sample]
    # Cells start at 0, which is also what a sample that has ended contributes.
    table = torch.zeros(lengths.shape[0] * longest, dtype=to_go.dtype, device=to_go.device)
    total = table.index_add(0, cell, to_go)[cell]
    present = table.index_add(0, cell, torch.ones_like(to_go))[cell]
    highest = table.scatter_reduce(0, cell, to_go, "amax", include_self=False)[cell]
    lowest = table.scatter_reduce(0, cell, to_go, "amin", include_self=False)[cell]
    someone_ended = present < size
    highest = torch.where(someone_ended, highest.clamp(min=0.0), highest)
    lowest = torch.where(someone_ended, lowest.clamp(max=0.0), lowest)
    baseline = (total - to_go) / (size - 1).clamp(min=1) if leave_one_out else total / size
    return torch.where(highest == lowest, 0.0, to_go - baseline).to(rewards.dtype)


def tutorial(rewards: Tensor, lengths: Tensor, gamma: float, eps: float = 1e-8) -> Tensor:
    """[S]: the discounted return-to-go of each step, centred and scaled over all S steps: (G - mean) / (std + eps).

    No groups and no bootstrap: the batch is the baseline. std divides by S - 1. Equal returns-to-go give exactly 0.
    Raises UsageError on shapes that do not fit.
    """
    return standardise(returns_to_go(rewards, lengths, gamma), eps=eps)


def standardise(advantages: Tensor, where: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """[S]: (A - mean) / (std + eps) with mean and std (ddof 1) taken over the steps in `where` [S] bool (default: all).

    The same shift and scale is applied to every step, those outside `where` included. Fewer than two steps, or equal
    advantages, give exactly 0 everywhere. Call it once per batch, before minibatches are drawn, never on each of them.
    Raises UsageError if `where` is no boolean tensor of the same shape.
    """
    if where is not None and (where.shape != advantages.shape or where.dtype != torch.bool):
        raise UsageError(
            f"where must be a boolean tensor of shape {list(advantages.shape)}, "
            f"got shape {list(where.shape)} of {where.dtype}."
        )
    chosen = advantages if where is None else advantages[where]
    if chosen.numel() < 2:
        return torch.zeros_like(advantages)
    chosen = chosen.to(accumulator_dtype(advantages))
    lowest, highest = torch.aminmax(chosen)
    if bool(highest - lowest <= _rounding(advantages) * torch.maximum(highest.abs(), lowest.abs())):
        return torch.zeros_like(advantages)
    std, mean = torch.std_mean(chosen)
    return ((advantages - mean) / (std + eps)).to(advantages.dtype)


def degenerate_fraction(rewards: Tensor, lengths: Tensor, group: Tensor) -> float:
    """Fraction of groups whose returns are all equal (groups of one among them), in [0, 1]: they teach nothing.

    Raises UsageError on shapes that do not fit or if there is no sample, TrainingError on non-finite returns.
    """
    g = _groups(rewards, lengths, group)
    if not lengths.numel():
        raise UsageError("degenerate_fraction needs at least one sample, got none.")
    return float((g.degenerate / g.size).sum() / (1.0 / g.size).sum())

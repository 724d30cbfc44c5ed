"""Group-relative advantages that need no value function: (rewards [S], lengths [N], group [N]) -> advantages [S].

What a group is and when its returns count as equal is said in groups.py. outcomes.py has further
estimators, which know one return per sample.
"""

from typing import Literal

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.groups import Groups, check_ddof, compare, group_returns, per_step, relative_rounding
from grouprl.objective.packed import (
    accumulator_dtype,
    check_finite,
    check_floats,
    check_packed,
    check_per_sample,
    position,
    segment_ids,
)
from grouprl.objective.returns import returns_to_go


def outcome(
    rewards: Tensor,
    lengths: Tensor,
    group: Tensor,
    scale: bool | Literal["group", "batch", "none"] = True,
    eps: float = 1e-8,
    ddof: int = 1,
) -> Tensor:
    """[S]: A_it = (R_i - mean_g R) / (std R + eps) at every step t of sample i; R_i = sum of its rewards.

    scale says whose standard deviation: that of the group ("group" or True), that of all returns of the batch ("batch":
    groups that hardly differ are not blown up), or no division ("none" or False). It divides by the number of returns
    less ddof. Equal returns and groups of one give exactly 0. Without division the policy gradient is (G-1)/G of the
    true one. The divisions bias it, as they weigh groups and are made of the returns that they divide. Sources: GRPO
    with outcome rewards, arXiv 2402.03300 section 4.1.2; "batch": Lite PPO, 2508.08221; "none": Dr. GRPO, 2503.20783.
    TRL: eps 1e-4, ddof 1.
    Raises UsageError on shapes that do not fit, an unknown scale or ddof other than 0 or 1, TrainingError on non-finite
    returns.
    """
    return per_step(_centred(group_returns(rewards, lengths, group), scale, eps, ddof), lengths, rewards.dtype)


def _centred(g: Groups, scale: bool | str, eps: float, ddof: int) -> Tensor:
    """[N]: returns less the mean of their group, divided by the deviation that `scale` names; see `outcome`."""
    check_ddof(ddof)
    if isinstance(scale, bool):
        scale = "group" if scale else "none"
    if scale not in ("group", "batch", "none"):
        raise UsageError(f'scale must be "group" (or True), "batch" or "none" (or False), got {scale!r}.')
    advantages = g.returns - g.mean
    if scale == "group":
        advantages = advantages / (g.std(ddof) + eps)
    elif scale == "batch":
        squares = (g.returns - g.returns.mean()).square().sum()
        advantages = advantages / ((squares / max(1, g.returns.shape[0] - ddof)).sqrt() + eps)
    return torch.where(g.degenerate, 0.0, advantages)


def gigpo(
    rewards: Tensor,
    lengths: Tensor,
    group: Tensor,
    states: Tensor,
    gamma: float = 1.0,
    weight: float = 1.0,
    scale: bool | Literal["group", "none"] = True,
    eps: float = 1e-8,
    ddof: int = 1,
) -> Tensor:
    """[S]: A_it = (R_i - mean_g R) / (std_g R + eps) + weight (G_it - mean_c G) / (std_c G + eps).

    c are the steps of the group that were taken in the same state, at whatever time; G is the discounted return-to-go.
    states [S] are integers that are equal where states are; a negative one is equal to none. scale="none" (or False)
    leaves both divisions out. A step whose state no other step of the group shares has only the first term, as have
    steps of equal returns-to-go. Source: GiGPO, arXiv 2505.10978 section 4.

    Biased, with or without the divisions: in the second term a step is weighed by (n - 1) / n with the number n of
    steps in its state, a singleton by 0, so states that are visited more often count more; and where an episode comes
    back to a state, what it does there changes its own baseline.
    Raises UsageError on shapes that do not fit, an unknown scale, gamma outside [0, 1] or ddof other than 0 or 1,
    TrainingError on non-finite returns.
    """
    episodes = outcome(rewards, lengths, group, scale, eps, ddof)
    wide = rewards.to(accumulator_dtype(rewards))
    cell = _cells(lengths, group, states)
    # Sizes are not discounted: a bound of rounding may be too large.
    sizes = returns_to_go(wide.abs(), lengths, 1.0)
    g = compare(returns_to_go(wide, lengths, gamma), sizes, cell, relative_rounding(rewards))
    steps = _centred(g, scale, eps, ddof)
    return episodes + weight * torch.where(states < 0, 0.0, steps).to(rewards.dtype)


def shared_states(lengths: Tensor, group: Tensor, states: Tensor) -> float:
    """Share of the steps whose state another step of the group was in, in [0, 1]: those that `gigpo` compares twice.

    Raises UsageError on shapes that do not fit or if there is no step.
    """
    if not states.numel():
        raise UsageError("shared_states needs at least one step, got none.")
    _, cell, count = torch.unique(_cells(lengths, group, states), return_inverse=True, return_counts=True)
    return float(((count[cell] > 1) & (states >= 0)).double().mean())


def _cells(lengths: Tensor, group: Tensor, states: Tensor) -> Tensor:
    """[S] int64: equal where both the group and the state of a step are."""
    check_packed(lengths, states=states)
    check_per_sample(lengths, group=group)
    _, group_id = torch.unique(group, return_inverse=True)
    _, state_id = torch.unique(states, return_inverse=True)
    cell: Tensor = group_id[segment_ids(lengths)] * (states.numel() + 1) + state_id
    return cell


def leave_one_out(rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
    """[S]: A_it = R_i - mean_{j != i} R_j = G/(G-1) (R_i - mean_g R) at every step of sample i.

    The baseline does not depend on the sample it is subtracted from, so the policy gradient stays unbiased. A group of
    one has nothing to compare with: exactly 0, as have equal returns. Source: RLOO, arXiv 2402.14740.
    Raises UsageError on shapes that do not fit, TrainingError on non-finite returns.
    """
    g = group_returns(rewards, lengths, group)
    advantages = (g.returns - g.mean) * (g.size / (g.size - 1).clamp(min=1))
    return per_step(torch.where(g.degenerate, 0.0, advantages), lengths, rewards.dtype)


def timestep(rewards: Tensor, lengths: Tensor, group: Tensor, gamma: float = 1.0, leave_one_out: bool = True) -> Tensor:
    """[S]: A_it = G_it - mean over the group's other samples of G_jt, at the same step t; ended samples count as 0.

    G is the discounted return-to-go without bootstrap. The baseline of a step is made of other samples alone, so the
    policy gradient stays unbiased; left out instead of counted as 0, those that have ended would bias it where a policy
    decides when to end, unless a step that no other sample has keeps its whole return. leave_one_out=False takes the
    mean over all samples, i included, which shrinks the advantage by (G-1)/G. Groups of one, and steps where the whole
    group has the same return-to-go, give exactly 0. Sources: GR2PO, arXiv 2609.19850; GPG, 2510.03679.
    Raises UsageError on shapes that do not fit, TrainingError on non-finite returns.
    """
    g = group_returns(rewards, lengths, group)
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
    equal = highest - lowest <= g.rounding[sample]  # no return-to-go is off by more than the return may be
    return torch.where(equal, 0.0, to_go - baseline).to(rewards.dtype)


def batch_returns(rewards: Tensor, lengths: Tensor, gamma: float, eps: float = 1e-8) -> Tensor:
    """[S]: the discounted return-to-go of each step, centred and scaled over all S steps: (G - mean) / (std + eps).

    No groups and no bootstrap: the batch is the baseline. std divides by S - 1. Equal returns-to-go give exactly 0.
    Raises UsageError on shapes that do not fit or integer rewards, TrainingError on non-finite returns.
    """
    check_floats(rewards=rewards)
    wide = rewards.float() if torch.finfo(rewards.dtype).bits < 32 else rewards  # 16 bits would not hold a sum of many
    return standardise(returns_to_go(wide, lengths, gamma), eps=eps).to(rewards.dtype)


def standardise(advantages: Tensor, where: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """[S]: (A - mean) / (std + eps) with mean and std (ddof 1) taken over the steps in `where` [S] bool (default: all).

    The same shift and scale is applied to every step, those outside `where` included. Fewer than two steps, or equal
    advantages, give exactly 0 everywhere. Call it once per batch, before minibatches are drawn, never on each of them.
    Raises UsageError if `where` is no boolean tensor of the same shape, TrainingError if one of those is not
    finite.
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
    check_finite(chosen)
    lowest, highest = torch.aminmax(chosen)
    if bool(highest - lowest <= relative_rounding(advantages) * torch.maximum(highest.abs(), lowest.abs())):
        return torch.zeros_like(advantages)
    std, mean = torch.std_mean(chosen)
    return ((advantages - mean) / (std + eps)).to(advantages.dtype)


def degenerate_fraction(rewards: Tensor, lengths: Tensor, group: Tensor) -> float:
    """Fraction of groups whose returns are all equal (groups of one among them), in [0, 1]: they teach nothing.

    Raises UsageError on shapes that do not fit or if there is no sample, TrainingError on non-finite returns.
    """
    g = group_returns(rewards, lengths, group)
    if not lengths.numel():
        raise UsageError("degenerate_fraction needs at least one sample, got none.")
    return float((g.degenerate / g.size).sum() / (1.0 / g.size).sum())

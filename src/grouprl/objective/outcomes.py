"""Advantages for samples that are judged once, at their end: (rewards [S], lengths [N], group [N]) -> advantages [S].

As in advantages.py, a sample's return R_i is the sum of its rewards, and equal returns give exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.objective.advantages import batch_returns, outcome, standardise
from grouprl.objective.groups import check_ddof, group_returns, per_step
from grouprl.objective.packed import (
    accumulator_dtype,
    check_packed,
    check_per_sample,
    discounted_suffix_sum,
    remaining,
    segment_ids,
)


def maxrl(rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
    """[S]: A_it = (R_i - mean_g R) / mean_g R at every step of sample i; 0 where the mean is 0.

    With rewards of 0 and 1 the gradient is that of the log-likelihood of success instead of its probability, up to the
    order that the group size allows: a group with one success in G weighs it by G - 1. Source: Maximum Likelihood
    Reinforcement Learning, arXiv 2602.02710.
    Raises UsageError on shapes that do not fit or a return that is negative by more than rounding, TrainingError on
    non-finite returns.
    """
    g = group_returns(rewards, lengths, group)
    negative = g.returns < -g.rounding  # a sum of rewards may miss 0 by that much
    if bool(negative.any()):
        sample = int(negative.nonzero()[0])
        raise UsageError(
            f"sample {sample} has return {float(g.returns[sample])}; maxrl divides by the mean return and so needs "
            "returns of at least 0: rewards like 0 and 1, no penalties; choose outcome or leave_one_out for others."
        )
    advantages = (g.returns - g.mean) / torch.where(g.degenerate, 1.0, g.mean)
    return per_step(torch.where(g.degenerate, 0.0, advantages), lengths, rewards.dtype)


def opo(rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
    """[S]: A_it = R_i - b at every step of sample i, b = sum_j n_j R_j / sum_j n_j over its group.

    The baseline of least variance if the squared norm of a sample's gradient grows with its length and not with its
    return. Biased where lengths differ, as it contains the sample with a weight that depends on its length. Source:
    On-Policy RL with Optimal Reward Baseline, arXiv 2505.23585.
    Raises UsageError on shapes that do not fit, TrainingError on non-finite returns.
    """
    g = group_returns(rewards, lengths, group)
    steps = lengths.to(g.returns.dtype)
    zero = torch.zeros_like(g.returns)
    total = zero.index_add(0, g.ids, steps)[g.ids]
    baseline = zero.index_add(0, g.ids, steps * g.returns)[g.ids] / total.clamp(min=1.0)
    return per_step(torch.where(g.degenerate, 0.0, g.returns - baseline), lengths, rewards.dtype)


def pass_at_k(rewards: Tensor, lengths: Tensor, group: Tensor, k: int | None = None) -> Tensor:
    """[S]: A_it = the mean, over the subsets of k samples of the group that contain i, of what i adds to their maximum.

    That is max_S R - max_{S without i} R, averaged over S in closed form. The second maximum is a baseline that does
    not depend on sample i, so k / G sum_i A_i grad log pi(i) is an unbiased gradient of the expected maximum of k
    samples (of pass@k, if rewards are 0 and 1). k = None takes the whole group: R_max - R_second for the best sample, 0
    for the others. Ties add nothing. No advantage is below 0: samples that are never the best are left alone, not
    pushed down. Sources: k = G, arXiv 2503.19595; the mean over subsets, PKPO, 2505.15201. Pass@k Training, 2508.10751,
    is another: it standardises the subsets' maxima.
    Raises UsageError on shapes that do not fit, k below 2 or above the size of a group, TrainingError on non-finite
    returns.
    """
    if k is not None and k < 2:
        raise UsageError(f"k must be at least 2 or None (the whole group), got {k}; for k = 1 use leave_one_out.")
    g = group_returns(rewards, lengths, group)
    if k is not None and g.size.numel() and int(g.size.min()) < k:
        raise UsageError(
            f"k = {k} needs groups of at least {k} samples, the smallest has {int(g.size.min())}; "
            "lower k or draw more samples per group."
        )
    best_first = torch.argsort(g.returns, descending=True)
    order = best_first[torch.argsort(g.ids[best_first], stable=True)]
    sizes = torch.bincount(g.ids)
    returns, size, worse = g.returns[order], g.size[order], remaining(sizes)
    gap = torch.where(worse > 0, returns - returns.roll(-1), 0.0)
    gap = torch.where(gap <= g.rounding[order], 0.0, gap)
    # The gap below the m-th worst sample counts for every sample above it, in the subsets whose others all lie below
    # the gap: C(m, k - 1) of C(G - 1, k - 1). So the advantage is a sum of weighted gaps from a sample downwards.
    others = (size if k is None else torch.full_like(size, k)) - 1
    advantages = torch.zeros_like(returns)
    advantages[order] = discounted_suffix_sum(gap * _binomial_ratio(worse, size - 1, others), sizes, 1.0)
    return per_step(advantages, lengths, rewards.dtype)


def _binomial_ratio(n: Tensor, m: Tensor, k: Tensor) -> Tensor:
    """C(n, k) / C(m, k) for k <= m, in the accumulator's precision; 0 where k > n."""
    wide = accumulator_dtype(n)
    n, m, k = n.to(wide), m.to(wide), k.to(wide)
    log_ratio = (n + 1).lgamma() - ((n - k).clamp(min=0) + 1).lgamma() - (m + 1).lgamma() + (m - k + 1).lgamma()
    return torch.where(k > n, 0.0, log_ratio.exp())


def gdpo(
    rewards_per_function: Tensor, weights: Tensor, lengths: Tensor, group: Tensor, eps: float = 1e-4, ddof: int = 1
) -> Tensor:
    """[S]: A_it = a_i / (std a + eps), a_i = sum_f w_f (R_if - mean_g R_f) / (std_g R_f + eps).

    rewards_per_function [N, F], one column per reward function, weights [F]. Each function is scaled on its own, so
    that none drowns the others. NaN says that a function does not apply to a sample: it is left out of that function's
    mean and standard deviation, and adds 0 to the sample. The batch's std counts the samples that some function applies
    to, each once; their mean needs no subtracting, it is 0 by construction. Standard deviations divide by the count
    less ddof. A function whose rewards are equal within a group adds exactly 0. Source: GDPO, arXiv 2601.05242.
    Raises UsageError on shapes that do not fit or weights that are not finite, TrainingError on infinite rewards.
    """
    check_ddof(ddof)
    check_packed(lengths)
    check_per_sample(lengths, rewards_per_function=rewards_per_function, group=group)
    if rewards_per_function.ndim != 2 or weights.shape != rewards_per_function.shape[1:]:
        raise UsageError(
            f"rewards_per_function must have shape [N, F] and weights [F], got {list(rewards_per_function.shape)} and "
            f"{list(weights.shape)}."
        )
    if not bool(torch.isfinite(weights).all()):
        raise UsageError(f"weights must be finite numbers, got {weights.tolist()}.")
    if bool(rewards_per_function.isinf().any()):
        sample, function = rewards_per_function.isinf().nonzero()[0].tolist()
        raise TrainingError(
            f"function {function} gave sample {sample} the reward {float(rewards_per_function[sample, function])}; "
            "rewards must be finite numbers, or NaN where a function does not apply."
        )
    applies = ~rewards_per_function.isnan()
    total = torch.zeros(lengths.shape[0], dtype=accumulator_dtype(lengths), device=lengths.device)
    for rewards, applied, weight in zip(
        rewards_per_function.unbind(1), applies.unbind(1), weights.tolist(), strict=True
    ):
        if bool(applied.any()):
            g = group_returns(rewards[applied], torch.ones_like(lengths[applied]), group[applied])
            score = torch.where(g.degenerate, 0.0, (g.returns - g.mean) / (g.std(ddof) + eps))
            total[applied] += weight * score
    scored = total[applies.any(1)]
    std = (scored.square().sum() / max(1, scored.numel() - ddof)).sqrt()
    return per_step(total / (std + eps), lengths, rewards_per_function.dtype)


def reinforce_pp(
    rewards: Tensor, lengths: Tensor, group: Tensor | None = None, gamma: float = 1.0, baseline: bool = False
) -> Tensor:
    """[S]: return-to-go, centred and scaled over all S steps of the batch: one scale for all prompts.

    baseline=True (REINFORCE++-baseline) first takes the mean return of the sample's group from its whole return, as if
    that were its last reward: gamma^(steps to come) (R_i - mean_g R), then scales over the batch. Longer samples pull
    the batch's mean, which would shift groups with nothing to tell apart; they keep exactly 0. The penalty on the KL to
    the reference is `kl_in_reward`, applied before. Source: arXiv 2501.03262.
    Raises UsageError on shapes that do not fit, gamma outside [0, 1] or baseline=True without group, TrainingError on
    non-finite returns.
    """
    if baseline and group is None:
        raise UsageError("baseline=True compares samples of a group: pass group [N].")
    g = group_returns(rewards, lengths, torch.zeros_like(lengths) if group is None else group)
    if not baseline:
        return batch_returns(rewards, lengths, gamma)
    if not 0.0 <= gamma <= 1.0:
        raise UsageError(f"gamma must lie in [0, 1], got {gamma}; 1.0 is usual.")
    centred = outcome(rewards, lengths, g.ids, scale="none") * gamma ** remaining(lengths)
    return torch.where(g.degenerate[segment_ids(lengths)], 0.0, standardise(centred))

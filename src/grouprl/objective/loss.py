"""The loss of GRPO, whole: the one function that both arenas minimise, and that compiled code is held to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grouprl.objective.divergences import sampled_kl_loss
from grouprl.objective.losses import LOSSES, Objective
from grouprl.objective.sequence import importance_logp, off_policy_mask
from grouprl.objective.user_functions import own_surrogate


class Fixed(NamedTuple):
    """What is fixed of m steps before the policy is evaluated on them.

    Attributes:
        advantages: ``[m]``. weights: ``[m]``, or one number for all steps.
        logp_old: ``[m]`` under the policy that sampled; None: the policy itself, as in the first step on a batch.
        logp_ref: ``[m]`` under the reference; None: no sampled divergence.
        lengths: ``[n]`` steps of each sample, if the m steps are those of n whole samples, end to end.
        turns: ``[k]`` steps of each turn of these samples, end to end.
        correction: ``[m]`` by which surrogates are multiplied, where another program sampled than the one that learns;
            see `sampler_correction`. None: 1.
        chosen: ``[m]`` bool, the steps whose surrogate counts; None: all.
        entropy_weights: ``[m]`` of the entropy bonus; None: ``weights``.
        logp_sampled: ``[m]`` as another program said that sampled, for `off_policy_mask`; None: ``logp_old``.
    """

    advantages: Tensor
    weights: Tensor | float
    logp_old: Tensor | None = None
    logp_ref: Tensor | None = None
    lengths: Tensor | None = None
    turns: Tensor | None = None
    correction: Tensor | None = None
    chosen: Tensor | None = None
    entropy_weights: Tensor | None = None
    logp_sampled: Tensor | None = None


class LossTerms(NamedTuple):
    """The loss and what it is made of.

    Attributes:
        loss: a number, to be differentiated.
        surrogate: ``[m]``. kl: ``[m]``, or None without a divergence.
        cut: two of ``[m]`` bool, the steps of negative and of positive advantage that the loss bounds, as `Loss.cut`
            says; None where that was not asked for, or cannot happen.
        bonus: what the loss is lower for the entropy, a number; None where the entropy has no weights of its own.
    """

    loss: Tensor
    surrogate: Tensor
    kl: Tensor | None
    cut: tuple[Tensor, Tensor] | None
    bonus: Tensor | None = None


def policy_loss(
    objective: Objective,
    logp: Tensor,
    fixed: Fixed,
    *,
    entropy: Tensor | None = None,
    kl: Tensor | None = None,
    count_cut: bool = True,
) -> LossTerms:
    """sum_t w_t (c_t surrogate_t + beta KL_t - entropy_coef H_t) over m steps, to be minimised.

    The surrogate is 0 for steps that are not `fixed.chosen`. The entropy may have weights of its own.

    The surrogate is `objective.loss_type`'s; with `fixed.logp_old` None its ratio is 1 in value and
    exp(logp - sg(logp)) in gradient. Weights are fixed for a whole optimizer step, so that the losses of its parts add
    up to its loss, however it is split.

    Args:
        logp: ``[m]`` log-probabilities under the policy, differentiable.
        entropy: ``[m]``, differentiable, for the bonus.
        kl: ``[m]``, differentiable: an exact divergence, in the place of one sampled from `fixed.logp_ref`.
        count_cut: whether to say which steps are bounded.

    Sources: GRPO, arXiv 2402.03300 equation 3; the entries of `LOSSES` and `DIVERGENCES`.
    Raises UsageError on shapes that do not fit, TrainingError if a user's surrogate returns something else than
    [m] finite numbers that depend on `logp`.
    """
    entry, advantages, effective = LOSSES[objective.loss_type], fixed.advantages, logp
    old = logp.detach() if fixed.logp_old is None else fixed.logp_old
    level = objective.importance_sampling_level
    if level != "token":
        pieces = fixed.turns if level == "turn" else fixed.lengths
        assert pieces is not None
        effective = importance_logp(logp, old, pieces, level)
        advantages, old = advantages.to(effective.dtype), old.to(effective.dtype)

    own = objective.surrogate_function
    if own is None:
        surrogate = entry.surrogate(objective, effective, old, advantages, fixed.lengths)
    else:
        surrogate = own_surrogate(own, effective, old, advantages)
    if objective.off_policy_mask_threshold is not None:
        assert fixed.lengths is not None
        sampled = (old if fixed.logp_sampled is None else fixed.logp_sampled).to(logp.dtype)
        surrogate = surrogate * off_policy_mask(
            logp, sampled, fixed.advantages, fixed.lengths, objective.off_policy_mask_threshold
        )
    if fixed.correction is not None:
        surrogate = surrogate * fixed.correction

    if fixed.chosen is not None:
        surrogate = surrogate * fixed.chosen
    losses = surrogate
    if kl is None and fixed.logp_ref is not None:
        kl = sampled_kl_loss(logp, fixed.logp_ref, objective.kl_estimator, fixed.logp_old)
    if kl is not None:
        losses = losses + objective.beta * kl
    bonus = None
    if entropy is not None and objective.entropy_coef > 0:
        if fixed.entropy_weights is None:
            losses = losses - objective.entropy_coef * entropy
        else:
            bonus = objective.entropy_coef * (fixed.entropy_weights * entropy).sum()
    loss = (fixed.weights * losses).sum()
    if bonus is not None:
        loss = loss - bonus

    cut = None
    if count_cut and own is None and entry.cut is not None and fixed.logp_old is not None:
        with torch.no_grad():
            cut = entry.cut(objective, effective, old, advantages)
    return LossTerms(
        loss, surrogate.detach(), None if kl is None else kl.detach(), cut, None if bonus is None else bonus.detach()
    )

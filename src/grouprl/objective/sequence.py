"""Importance ratios of whole samples or turns, and a mask of samples gone too far off policy.

The likelihood of a sample is compared with its likelihood under the policy that drew it, per step:
s_i = exp(mean_t(logp - logp_old)), the geometric mean of its steps' ratios. `importance_logp` gives log-probabilities
whose ratio to logp_old is s_i at every step, so that every surrogate works at every level. The ratio of a turn is the
same with the turn in the place of the sample.

A sample must be whole: unlike the ratio of a step, s_i of half a sample is another number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.packed import accumulator_dtype, check_packed, segment_ids, segment_sum


def _mean_log_ratio(logp: Tensor, logp_old: Tensor, lengths: Tensor) -> Tensor:
    """[N] in the accumulator's precision: GSPO clips at 3e-4, too fine for sums of float32 log-probabilities."""
    if logp.shape != logp_old.shape:
        raise UsageError(f"logp has shape {list(logp.shape)} and logp_old {list(logp_old.shape)}; pass one per step.")
    check_packed(lengths, logp=logp)
    wide = accumulator_dtype(logp)
    return segment_sum(logp.to(wide) - logp_old.detach().to(wide), lengths) / lengths.clamp(min=1)


def gspo_log_ratio(logp: Tensor, logp_old: Tensor, lengths: Tensor) -> Tensor:
    """[S] float64: log s_i = mean over the steps of sample i of (logp - logp_old), repeated at each of its steps.

    The gradient flows through the mean: at each step s_i stands for the whole sample. Source: GSPO, arXiv 2507.18071
    equation 7. Raises UsageError on shapes that do not fit.
    """
    return _mean_log_ratio(logp, logp_old, lengths)[segment_ids(lengths)]


def gspo_token_log_ratio(logp: Tensor, logp_old: Tensor, lengths: Tensor) -> Tensor:
    """[S] float64: log of s_it = sg(s_i) exp(logp - sg(logp)): the value of s_i, but the gradient of the own step only.

    With one advantage per sample it is the same as `gspo_log_ratio`; it also allows advantages that differ from step to
    step. Source: GSPO-token, arXiv 2507.18071 section 4.3. Raises UsageError on shapes that do not fit.
    """
    value = gspo_log_ratio(logp, logp_old, lengths).detach()
    return value + (logp - logp.detach()).to(value.dtype)


def importance_logp(
    logp: Tensor, logp_old: Tensor, lengths: Tensor, level: Literal["token", "turn", "sequence", "sequence_token"]
) -> Tensor:
    """[S]: log-probabilities to hand to a surrogate in place of logp, so that its ratio is the one of `level`.

    "token": logp itself. "sequence": logp_old + `gspo_log_ratio`. "sequence_token": logp_old + `gspo_token_log_ratio`.
    "turn": as "sequence", with the lengths of the turns. The last three are float64 (float32 on Apple's GPU).

    At level "sequence" every step of a sample has the same loss, so `sample_mean` weights give GSPO's objective: the
    mean over samples of the surrogate of s_i. Weights that are equal for all steps multiply it by the sample's length.
    Raises UsageError on shapes that do not fit or an unknown level.
    """
    if level == "token":
        check_packed(lengths, logp=logp)
        return logp
    if level in ("sequence", "turn"):
        log_ratio = gspo_log_ratio(logp, logp_old, lengths)
    elif level == "sequence_token":
        log_ratio = gspo_token_log_ratio(logp, logp_old, lengths)
    else:
        raise UsageError(f'level must be "token", "turn", "sequence" or "sequence_token", got {level!r}.')
    return logp_old.detach().to(log_ratio.dtype) + log_ratio


@torch.no_grad()
def off_policy_mask(logp: Tensor, logp_old: Tensor, advantages: Tensor, lengths: Tensor, delta: float) -> Tensor:
    """[S] bool, True = keep: drops A < 0 steps of samples whose mean_t(logp_old - logp) exceeds delta.

    Such a sample has become unlikely already; pushing it down further only does harm. With one advantage per sample it
    goes as a whole. logp_old should be what the sampler said, so that its own deviations count too. Multiply the
    losses by the mask; denominators stay as they are. Source: off-policy sequence masking, DeepSeek-V3.2, arXiv
    2512.02556 equation 9.
    Raises UsageError on shapes that do not fit or delta not above 0.
    """
    if not delta > 0.0:
        raise UsageError(f"delta must be above 0, got {delta}; it bounds the mean log-ratio of a sample, 0.5 is usual.")
    check_packed(lengths, advantages=advantages)
    drifted = -gspo_log_ratio(logp, logp_old, lengths) > delta
    return ~((advantages < 0) & drifted)

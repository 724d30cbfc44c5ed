"""Samples drawn by another program than the one that learns: how likely they are here, relative to there.

Two implementations of one model round differently. Their log-probabilities differ by some hundredths of a nat at a
token, which adds up over a completion. The ratio of both likelihoods is the weight with which a sample of the one
stands for a sample of the other (importance sampling). It is bounded, since a few large weights would decide the
gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.packed import accumulator_dtype, check_packed, segment_ids, segment_sum

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
"""Whose ratio it is, that of each step or that of the whole sample, and what becomes of one that is out of bounds."""


@torch.no_grad()
def sampler_correction(
    logp: Tensor,
    logp_sampled: Tensor,
    lengths: Tensor,
    mode: CorrectionMode,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """[S]: the bounded ratio exp(logp - logp_sampled), with which the surrogate of each step is to be multiplied.

    "token": the ratio of the step. "sequence": the product of the ratios of all steps of the sample, at each of them.
    "truncate": a ratio beyond a bound becomes that bound. "mask": it becomes 0. Bounds themselves are within.

    Args:
        logp: ``[S]`` log-probabilities in nats under the policy as it learns, at the time of sampling.
        logp_sampled: ``[S]`` log-probabilities in nats as the sampler drew.
        lengths: ``[N]`` steps of each sample.
        low, high: the bounds; None is no bound.

    Sources: truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training"; masked, Liu et al. 2025, "When speed kills stability".
    Raises UsageError on shapes that do not fit, an unknown mode, or bounds the wrong way round.
    """
    check_packed(lengths, logp=logp, logp_sampled=logp_sampled)
    level, _, outside = mode.partition("_")
    if level not in ("token", "sequence") or outside not in ("truncate", "mask"):
        raise UsageError(
            f'mode must be "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask", got {mode!r}.'
        )
    if low is not None and high is not None and low > high:
        raise UsageError(f"the lower bound {low} of the ratio is above the upper bound {high}; swap them.")
    wide = accumulator_dtype(logp)
    log_ratio = logp.to(wide) - logp_sampled.to(wide)
    if level == "sequence":
        log_ratio = segment_sum(log_ratio, lengths)[segment_ids(lengths)]
    ratio = log_ratio.exp()
    if low is None and high is None:
        bounded = ratio
    elif outside == "truncate":
        bounded = ratio.clamp(low, high)
    else:
        inside = torch.ones_like(ratio, dtype=torch.bool)
        if low is not None:
            inside &= ratio >= low
        if high is not None:
            inside &= ratio <= high
        bounded = torch.where(inside, ratio, 0.0)
    return bounded.to(logp.dtype)

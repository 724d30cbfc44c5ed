"""Weights of steps that another policy sampled, for an update of today's.

Source: generalised proximal policy optimization with sample reuse, Queeney, Paschalidis and Cassandras 2021,
arXiv 2111.00072.
"""

import math

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.groups import relative_rounding
from grouprl.objective.packed import accumulator_dtype, check_finite


def importance_weights(logp: Tensor, logp_then: Tensor, largest: float = 2.0) -> Tensor:
    """[S]: min(pi(a|s) / pi_then(a|s), largest), from log-probabilities [S] under today's policy and the sampling one.

    Where today's policy gives an action no probability, its weight is 0. The bound keeps one step from ruling a batch.
    Raises UsageError on shapes that differ, or a bound that is not above 0.
    """
    if logp.shape != logp_then.shape:
        raise UsageError(f"logp and logp_then must have one shape, got {list(logp.shape)} and {list(logp_then.shape)}.")
    if not largest > 0.0:
        raise UsageError(f"largest must be above 0, got {largest}.")
    return torch.where(logp == -math.inf, 0.0, logp - logp_then).exp().clamp(max=largest) * (logp > -math.inf)


def effective_share(weights: Tensor) -> float:
    """(sum w)^2 / (S sum w^2), in [0, 1]: the effective sample size of S steps with weights w [S], as a share of S.

    1: all weigh the same; 1 / S: one has all the weight. 0 where no step has any.
    """
    w = weights.to(accumulator_dtype(weights))
    squares = float(w.square().sum())
    return float(w.sum()) ** 2 / (len(w) * squares) if squares > 0.0 else 0.0


def standardise_weighted(advantages: Tensor, weights: Tensor, where: Tensor, eps: float = 1e-8) -> Tensor:
    """[S]: w (A - mean) / (std + eps), with weighted mean and std over the steps in ``where`` [S] bool.

    mean = sum w A / sum w, std^2 = sum w (A - mean)^2 / (sum w - sum w^2 / sum w): with weights of 1 it is
    :func:`standardise`. A clipped surrogate min(rho A, clip(rho) A) is homogeneous in A, so that an advantage which
    holds its weight gives the weighted surrogate, clipped around today's policy. Equal advantages give exactly 0.
    Raises UsageError on shapes that differ or a ``where`` that is not boolean, TrainingError if an advantage is not
    finite.
    """
    if not advantages.shape == weights.shape == where.shape or where.dtype != torch.bool:
        raise UsageError(
            f"advantages, weights and where (boolean) must have one shape, got {list(advantages.shape)}, "
            f"{list(weights.shape)} and {list(where.shape)} of {where.dtype}."
        )
    wide = accumulator_dtype(advantages)
    check_finite(advantages[where])
    a, w = advantages[where].to(wide), weights[where].to(wide)
    total = float(w.sum())
    spare = total - float(w.square().sum()) / total if total > 0.0 else 0.0
    if not spare > 0.0:
        return torch.zeros_like(advantages)
    counted = a[w > 0]
    lowest, highest = torch.aminmax(counted)
    if bool(highest - lowest <= relative_rounding(advantages) * torch.maximum(highest.abs(), lowest.abs())):
        return torch.zeros_like(advantages)
    mean = float(w @ a) / total
    std = (float(w @ (a - mean).square()) / spare) ** 0.5
    scaled: Tensor = weights * ((advantages - mean) / (std + eps))
    return scaled.to(advantages.dtype)

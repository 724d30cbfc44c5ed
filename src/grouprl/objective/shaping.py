"""Terms that change the reward itself, before advantages are made of it."""

from __future__ import annotations

from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.divergences import DIVERGENCES, SAMPLED_DIVERGENCES


def kl_in_reward(
    rewards: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor,
    beta: float,
    estimator: str = "k1",
) -> Tensor:
    """[S]: r_t - beta k(logp_old_t, logp_ref_t): pays for KL(pi_old || ref) step by step, instead of in the loss.

    A constant, as rewards are. Returns of whole samples then include the penalty of all their steps, and so does what
    is made of them: group means, standard deviations, the test for equal returns. k1 has no bias, neither as a value
    nor in the gradient that follows from it. Sources: REINFORCE++, arXiv 2501.03262; 2512.21852.
    Raises UsageError on differing shapes, beta below 0 or an unknown estimator.
    """
    entry = DIVERGENCES.get(estimator)
    if entry is None or entry.value is None:
        raise UsageError(f"estimator must be {' or '.join(SAMPLED_DIVERGENCES)}, got {estimator!r}.")
    if not beta >= 0.0:
        raise UsageError(f"beta must be at least 0, got {beta}; 0 means no penalty.")
    if rewards.shape != logp_old.shape:
        raise UsageError(
            f"rewards has shape {list(rewards.shape)} and logp_old {list(logp_old.shape)}; pass one of each per step."
        )
    return rewards - beta * entry.value(logp_old.detach(), logp_ref.detach())


def soft_overlong(lengths: Tensor, max_length: int, cache: int) -> Tensor:
    """[N] float32 in [-1, 0]: 0 up to max_length - cache steps, then falling linearly to -1 at max_length and beyond.

    To be added to a sample's reward. cache = 0 is the hard limit: -1 beyond max_length, else 0. Source: DAPO, arXiv
    2503.14476 equation 13. Raises UsageError unless 0 <= cache <= max_length and max_length >= 1.
    """
    if max_length < 1 or not 0 <= cache <= max_length:
        raise UsageError(
            f"max_length must be at least 1 and cache between 0 and max_length, got {max_length} and {cache}; cache is "
            "the stretch before max_length over which the penalty grows."
        )
    if cache == 0:
        return -(lengths > max_length).float()
    return ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0).float()

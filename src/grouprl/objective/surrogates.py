"""Policy-gradient surrogates: one loss per step [S], to be minimised; weights.py says how steps add up.

With ratio rho = exp(logp - logp_old) and advantage A, every surrogate has gradient -A grad logp at rho = 1.
`logp_old` and `advantages` are constants: no gradient flows into them. Ratios of whole samples: sequence.py.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.packed import accumulator_dtype, segment_ids, segment_sum

# exp(20) is 5e8: far beyond any clip range, yet finite in float32 after squaring and multiplying.
_LARGEST_LOG_RATIO = 20.0


def ratio(logp: Tensor, logp_old: Tensor) -> Tensor:
    """[S]: rho = exp(logp - logp_old) in at least float32, its value capped at exp(20).

    The cap keeps inf * 0 = NaN out of losses and gradients. The gradient stays rho grad logp at the cap, so that a step
    gone astray is still pulled back. Raises UsageError if the shapes differ.
    """
    if logp.shape != logp_old.shape:
        raise UsageError(f"logp has shape {list(logp.shape)} and logp_old {list(logp_old.shape)}; pass one per step.")
    if torch.finfo(logp.dtype).bits < 32:
        logp = logp.float()
    log_ratio = logp - logp_old.detach()
    at_cap = logp - logp.detach() + _LARGEST_LOG_RATIO
    return torch.where(log_ratio.detach() > _LARGEST_LOG_RATIO, at_cap, log_ratio).exp()


def _constants(logp: Tensor, advantages: Tensor) -> Tensor:
    if advantages.shape != logp.shape:
        raise UsageError(
            f"advantages has shape {list(advantages.shape)} and logp {list(logp.shape)}; pass one of each per step."
        )
    return advantages.detach()


def _check_clip(epsilon: float, epsilon_high: float | None) -> float:
    """The upper distance, which is the lower one where it is not given."""
    high = epsilon if epsilon_high is None else epsilon_high
    if not (0.0 < epsilon < 1.0 and high > 0.0):
        raise UsageError(
            f"epsilon must lie in (0, 1) and epsilon_high above 0, got {epsilon} and {high}; 0.2 is usual for both."
        )
    return high


def clipped(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """[S]: -min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A).

    epsilon_high is epsilon where it is not given. delta bounds the loss of a bad step that has become likely, and
    changes nothing else; without it rho is not bounded there. Sources: PPO, arXiv 1707.06347 equation 7; GRPO,
    2402.03300 equation 3; epsilon_high above epsilon, DAPO, 2503.14476; delta, the dual clip of 1912.09729 and the
    two-sided clip of INTELLECT-2, 2505.07291, which are the same.
    Raises UsageError on differing shapes, a clip range that is none, or delta <= 1 + epsilon_high.
    """
    high = _check_clip(epsilon, epsilon_high)
    if delta is not None and delta <= 1.0 + high:
        raise UsageError(f"delta must exceed 1 + epsilon_high = {1.0 + high}, got {delta}; 3.0 or 4.0 is usual.")
    a = _constants(logp, advantages)
    rho = ratio(logp, logp_old)
    gain = rho * a if delta is None else rho.clamp(max=delta) * a
    return -torch.minimum(gain, rho.clamp(1.0 - epsilon, 1.0 + high) * a)


def cispo(logp: Tensor, logp_old: Tensor, advantages: Tensor, cap: float = 5.0, floor: float = 0.0) -> Tensor:
    """[S]: -sg(clip(rho, floor, cap)) A logp: the clip bounds the weight of a step, and no step loses its gradient.

    cap and floor are ratios, not distances from 1. What others call epsilon_high follows one of two conventions. TRL,
    Liger and ScaleRL (arXiv 2510.13786) bound the ratio by epsilon_high itself: cap = epsilon_high, 5 is usual. The
    paper, verl and slime bound it by 1 + epsilon_high: cap = 1 + epsilon_high. The paper's formula has
    floor = 1 - epsilon_low, but its runs and TRL have none. Source: CISPO in MiniMax-M1, arXiv 2506.13585.
    Raises UsageError on differing shapes, cap below 1 or floor outside [0, 1].
    """
    if not (cap >= 1.0 and 0.0 <= floor <= 1.0):
        raise UsageError(
            f"cap must be at least 1 and floor lie in [0, 1], got {cap} and {floor}; both are ratios: for a clip range "
            "of 0.28 above 1 pass cap=1.28."
        )
    a = _constants(logp, advantages)
    return -ratio(logp, logp_old).detach().clamp(floor, cap) * a * logp


def sapo(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Tensor:
    """[S]: -(4 / tau) sigmoid(tau (rho - 1)) A with tau = tau_positive where A > 0, else tau_negative.

    A gate that closes smoothly as rho leaves 1, faster the larger tau. Source: Soft Adaptive Policy Optimization, arXiv
    2511.20347. Raises UsageError on differing shapes or a tau not above 0.
    """
    if not (tau_positive > 0.0 and tau_negative > 0.0):
        raise UsageError(
            f"tau_positive and tau_negative must be above 0, got {tau_positive} and {tau_negative}; "
            "1.0 and 1.05 are usual."
        )
    a = _constants(logp, advantages)
    tau = torch.where(a > 0, tau_positive, tau_negative)
    return -(4.0 / tau) * torch.sigmoid(tau * (ratio(logp, logp_old) - 1.0)) * a


def dppo(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, threshold: float = 0.2, divergence: Literal["tv", "kl"] = "tv"
) -> Tensor:
    """[S]: -rho A on the steps `dppo_mask` keeps, 0 on the others.

    Source: Divergence PPO, arXiv 2602.04879 equation 11. Raises UsageError as `dppo_mask` does.
    """
    keep = dppo_mask(logp, logp_old, advantages, threshold, divergence)
    return torch.where(keep, -ratio(logp, logp_old) * advantages.detach(), 0.0)


@torch.no_grad()
def dppo_mask(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, threshold: float = 0.2, divergence: Literal["tv", "kl"] = "tv"
) -> Tensor:
    """[S] bool: False where the policy has moved by more than `threshold` in the direction the advantage pushes.

    The move is measured on "this action or another", two events with probabilities p_old and p: "tv" is their total
    variation |p - p_old|, "kl" their divergence p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p)). Unlike a
    bound on the ratio, either lets rare actions move. Both need the probabilities of single actions, so not the
    log-probabilities of `importance_logp` and not densities. 0.2 is usual for "tv" and 0.05 for "kl".
    Source: arXiv 2602.04879 equations 12 and 13.
    Raises UsageError on differing shapes, threshold outside (0, 1) or an unknown divergence.
    """
    if not 0.0 < threshold < 1.0:
        raise UsageError(f"threshold must lie in (0, 1), got {threshold}; 0.2 is usual for tv, 0.05 for kl.")
    a = _constants(logp, advantages)
    kind = ratio(logp, logp_old).dtype  # checks the shapes
    new, old = logp.to(kind), logp_old.to(kind)
    up = new - old
    if divergence == "tv":
        moved = new.exp() - old.exp()
        return ~(((a > 0) & (moved > threshold)) | ((a < 0) & (-moved > threshold)))
    if divergence != "kl":
        raise UsageError(f'divergence must be "tv" or "kl", got {divergence!r}.')
    rest, rest_old = (1.0 - new.exp()).clamp(min=1e-8), (1.0 - old.exp()).clamp(min=1e-8)
    far = -old.exp() * up + rest_old * (rest_old / rest).log() > threshold
    return ~(far & (((a > 0) & (up > 0)) | ((a < 0) & (up < 0))))


def vespo(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> Tensor:
    """[S]: -sg(phi(W_i)) A logp, where W_i = prod_t rho_t is the ratio of the whole sample i.

    phi(W) = W^k e^(lambda (1 - W)) is 1 at W = 1 and falls smoothly on both sides: k says how fast below, lambda how
    fast above, each by the sign of the advantage (0 counts as positive). A sample must be whole. log W is kept within
    [log 1e-8, 20] and the log-ratio of a step within [-20, 20].
    Source: Variational Sequence-Level Soft Policy Optimization, arXiv 2602.10693.
    Raises UsageError on shapes that do not fit or a k or lambda not above 0.
    """
    if min(k_positive, lambda_positive, k_negative, lambda_negative) <= 0.0:
        raise UsageError(
            "k_positive, lambda_positive, k_negative and lambda_negative must be above 0, got "
            f"{k_positive}, {lambda_positive}, {k_negative} and {lambda_negative}; 2, 3, 3 and 2 are usual."
        )
    a = _constants(logp, advantages)
    ratio(logp, logp_old)  # checks the shapes
    with torch.no_grad():
        wide = accumulator_dtype(logp)
        per_step = (logp - logp_old).to(wide).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        log_w = segment_sum(per_step, lengths).clamp(math.log(1e-8), _LARGEST_LOG_RATIO)[segment_ids(lengths)]
        k, decay = torch.where(a >= 0, k_positive, k_negative), torch.where(a >= 0, lambda_positive, lambda_negative)
        phi = (decay * (1.0 - log_w.exp()) + k * log_w).exp().to(logp.dtype)
    return -phi * a * logp


def spo(logp: Tensor, logp_old: Tensor, advantages: Tensor, epsilon: float = 0.2) -> Tensor:
    """[S]: -(rho A - |A| / (2 epsilon) (rho - 1)^2): a parabola with its optimum on the edge of the clip range.

    Outside the range the gradient points back in, where `clipped` has none. Source: Simple Policy Optimization, arXiv
    2401.16025. Raises UsageError on differing shapes or epsilon not above 0.
    """
    if epsilon <= 0.0:
        raise UsageError(f"epsilon must be above 0, got {epsilon}; 0.2 is usual.")
    a = _constants(logp, advantages)
    rho = ratio(logp, logp_old)
    return -(rho * a - a.abs() / (2.0 * epsilon) * (rho - 1.0).square())


@torch.no_grad()
def beyond(logp: Tensor, logp_old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Two of [S] bool: where A < 0 and rho < low, and where A > 0 and rho > high.

    With low = 1 - epsilon and high = 1 + epsilon_high these are the steps whose gradient `clipped` cuts off.
    Raises UsageError on differing shapes.
    """
    a = _constants(logp, advantages)
    rho = ratio(logp, logp_old)
    return (a < 0) & (rho < low), (a > 0) & (rho > high)

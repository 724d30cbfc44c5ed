"""Policy-gradient surrogates: one loss per step [S], to be minimised; weights.py says how steps add up.

With ratio rho = exp(logp - logp_old) and advantage A, every surrogate has gradient -A grad logp at rho = 1.
`logp_old` and `advantages` are constants: no gradient flows into them. Ratios of whole samples: sequence.py.
"""

import torch
from torch import Tensor

from grouprl.errors import UsageError

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
    return (log_ratio - (log_ratio.detach() - _LARGEST_LOG_RATIO).clamp(min=0.0)).exp()


def _constants(logp: Tensor, advantages: Tensor) -> Tensor:
    if advantages.shape != logp.shape:
        raise UsageError(
            f"advantages has shape {list(advantages.shape)} and logp {list(logp.shape)}; pass one of each per step."
        )
    return advantages.detach()


def _check_clip(clip_low: float, clip_high: float) -> None:
    if not (0.0 < clip_low < 1.0 and clip_high > 0.0):
        raise UsageError(
            f"clip_low must lie in (0, 1) and clip_high above 0, got {clip_low} and {clip_high}; 0.2 is usual for both."
        )


def clipped(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """[S]: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A).

    Sources: PPO, arXiv 1707.06347 equation 7; GRPO, 2402.03300; clip_high above clip_low, DAPO, 2503.14476.
    Raises UsageError on differing shapes or a clip range that is none.
    """
    _check_clip(clip_low, clip_high)
    a = _constants(logp, advantages)
    rho = ratio(logp, logp_old)
    return -torch.minimum(rho * a, rho.clamp(1.0 - clip_low, 1.0 + clip_high) * a)


def dual_clipped(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> Tensor:
    """[S]: `clipped`, but where A < 0 no larger than -dual_clip A: bounds the loss of a bad step grown likely.

    Source: arXiv 1912.09729. Raises UsageError as `clipped` does, or if dual_clip <= 1 + clip_high.
    """
    if dual_clip <= 1.0 + clip_high:
        raise UsageError(f"dual_clip must exceed 1 + clip_high = {1.0 + clip_high}, got {dual_clip}; 3.0 is usual.")
    a = _constants(logp, advantages)
    loss = clipped(logp, logp_old, advantages, clip_low, clip_high)
    return torch.where(a < 0, torch.minimum(loss, -dual_clip * a), loss)


def two_sided(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float = 4.0,
) -> Tensor:
    """[S]: -min(min(rho, delta) A, clip(rho, 1 - clip_low, 1 + clip_high) A).

    The cap bounds the loss of bad steps grown likely, and nothing else: it is `dual_clipped` with dual_clip = delta.
    Source: INTELLECT-2, arXiv 2505.07291; TRL's `delta`.
    Raises UsageError as `clipped` does, or if delta <= 1 + clip_high.
    """
    _check_clip(clip_low, clip_high)
    if delta <= 1.0 + clip_high:
        raise UsageError(f"delta must exceed 1 + clip_high = {1.0 + clip_high}, got {delta}; 4.0 is usual.")
    a = _constants(logp, advantages)
    rho = ratio(logp, logp_old)
    return -torch.minimum(rho.clamp(max=delta) * a, rho.clamp(1.0 - clip_low, 1.0 + clip_high) * a)


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


def dppo(logp: Tensor, logp_old: Tensor, advantages: Tensor, threshold: float = 0.2) -> Tensor:
    """[S]: -rho A on the steps `dppo_mask` keeps, 0 on the others.

    Source: Divergence PPO with the binary total variation, arXiv 2602.04879 equation 11.
    Raises UsageError as `dppo_mask` does.
    """
    keep = dppo_mask(logp, logp_old, advantages, threshold)
    return torch.where(keep, -ratio(logp, logp_old) * advantages.detach(), 0.0)


@torch.no_grad()
def dppo_mask(logp: Tensor, logp_old: Tensor, advantages: Tensor, threshold: float = 0.2) -> Tensor:
    """[S] bool: False where the probability has moved by more than `threshold` in the direction the advantage pushes.

    |pi - pi_old| of the sampled action is the total variation of "this action or another"; unlike a bound on the ratio,
    it lets rare actions move. It needs the probabilities of single actions: no effective log-probabilities of
    `importance_logp`. Source: arXiv 2602.04879 equations 12 and 13.
    Raises UsageError on differing shapes or threshold outside (0, 1).
    """
    if not 0.0 < threshold < 1.0:
        raise UsageError(f"threshold must lie in (0, 1), got {threshold}; 0.2 is usual.")
    a = _constants(logp, advantages)
    rho = ratio(logp, logp_old)  # checks the shapes
    moved = logp.to(rho.dtype).exp() - logp_old.to(rho.dtype).exp()
    return ~(((a > 0) & (moved > threshold)) | ((a < 0) & (-moved > threshold)))


def spo(logp: Tensor, logp_old: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """[S]: -(rho A - |A| / (2 clip) (rho - 1)^2): a parabola with its optimum on the edge of the clip range.

    Outside the range the gradient points back in, where `clipped` has none. Source: Simple Policy Optimization, arXiv
    2401.16025. Raises UsageError on differing shapes or clip not above 0.
    """
    if clip <= 0.0:
        raise UsageError(f"clip must be above 0, got {clip}; 0.2 is usual.")
    a = _constants(logp, advantages)
    rho = ratio(logp, logp_old)
    return -(rho * a - a.abs() / (2.0 * clip) * (rho - 1.0).square())


@torch.no_grad()
def clip_fraction(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """[S] bool: the steps whose gradient `clipped` cuts off.

    They are those with A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low; average them for the fraction.
    Raises UsageError as `clipped` does.
    """
    _check_clip(clip_low, clip_high)
    a = _constants(logp, advantages)
    rho = ratio(logp, logp_old)
    return ((a > 0) & (rho > 1.0 + clip_high)) | ((a < 0) & (rho < 1.0 - clip_low))

"""Policy-gradient surrogates: one loss per step [S], to be minimised; weights.py says how steps add up.

With ratio rho = exp(logp - logp_old) and advantage A, every surrogate has gradient -A grad logp at rho = 1.
`logp_old` and `advantages` are constants: no gradient flows into them.
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

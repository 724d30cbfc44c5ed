"""The closed-form baseline for many small batches: each fit is pulled toward the one before, not toward zero.

A batch of some hundred steps says too little to fit hundreds of weights on it alone, and earlier batches, of policies
that differ, pull a joint fit behind the policy. Here the weights themselves are the memory, as a critic's are: what a
batch determines well moves to it, what it does not stays as it was. Source: the proximal form of policy evaluation,
Bertsekas 2018, Proximal algorithms and temporal difference methods for solving fixed point problems.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.objective.baseline import SMALLEST_POWER, BaselineFit, check_fit, explained, gram_of
from grouprl.objective.returns import gae


@torch.no_grad()
def fit_pulled_baseline(
    phi: Tensor,
    phi_last: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    terminated: Tensor,
    weights: Tensor | None,
    gamma: float,
    lam: float,
    pull: float = 0.3,
) -> BaselineFit:
    """Advantages of a batch under V(s) = phi(s) . w as it was before, and the weights for the next batch.

    Shapes as in :func:`~grouprl.objective.fit_baseline`; weights [F] of the previous fit, None for zeros.
        V = Phi w,   A = GAE(V),   w <- w + (Phi'Phi + n pull diag(max(diag(Phi'Phi) / n, 1e-3)))^-1 Phi'A
    which minimises sum_t (V_t + A_t - phi_t w')^2 + n pull (w' - w)'diag(..)(w' - w) over w'. A and V do not depend on
    the batch's own noise through w, so the baseline adds no bias to the gradient, however small the batch is.
    The system is solved in float64, with n rows or with F columns, whichever are fewer.

    Raises UsageError on shapes that do not fit or a pull that is not above 0, TrainingError if the fit is not finite.
    """
    check_fit(phi, phi_last, rewards, lengths, terminated, weights)
    if not pull > 0.0:
        raise UsageError(f"pull must be above 0, got {pull}; 0.3 suits batches of some hundred steps.")
    w = phi.new_zeros(phi.shape[1]) if weights is None else weights.to(phi)
    values, last_values = phi @ w, torch.where(terminated, 0.0, phi_last @ w)
    advantages = gae(rewards.to(phi.dtype), values, last_values, lengths, gamma, lam)
    moved = w + _step(phi, pull)(advantages)
    if not bool(torch.isfinite(moved).all() & torch.isfinite(advantages).all()):
        raise TrainingError(
            f"the baseline fit is not finite ({phi.shape[1]} features, {phi.shape[0]} steps): a reward or an "
            "observation is nan or too large; check the environment, or raise baseline_pull."
        )
    return BaselineFit(moved, w, values, last_values, advantages, explained(values, advantages))


def _step(phi: Tensor, pull: float) -> Callable[[Tensor], Tensor]:
    """From errors [n] to the change of the weights [F]."""
    n, n_features = phi.shape
    penalty = pull * n * phi.square().mean(0).clamp(min=SMALLEST_POWER)
    wide = n_features > n
    scaled = phi / penalty.sqrt() if wide else phi
    matrix = gram_of(scaled.T if wide else phi).to("cpu", torch.float64)
    matrix.diagonal().add_(1.0 if wide else penalty.to(matrix))
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise TrainingError("the baseline's features are not finite; check the environment's observations.")

    def solve(right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.to(factor).unsqueeze(1), factor).squeeze(1).to(phi)

    if wide:
        return lambda errors: scaled.T @ solve(errors) / penalty.sqrt()
    return lambda errors: solve(phi.T @ errors)

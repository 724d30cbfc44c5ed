"""A state-dependent baseline in closed form: ridge regression on random features, refitted on every batch.

No network, no optimiser, no value loss: the return expected at a state is phi(state) . w, and w is solved for on the
group's own samples. To call a spade a spade: this is a linear critic, fitted by least squares instead of by gradient.
Sources: linear-feature baselines, Duan et al. 2016, arXiv 1604.06778; generalised advantages, Schulman et al. 2016,
arXiv 1506.02438.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.objective.level import fit_level
from grouprl.objective.packed import check_packed, check_per_sample
from grouprl.objective.returns import gae

SMALLEST_POWER = 1e-3  # of a feature, where the ridge is scaled by it: a feature that is all but 0 stays tame
_CONSTANT_RIDGE = 1e-6  # the mean return must not be shrunk; this only keeps the matrix regular
_ROWS_A_FEATURE = 4  # fewer rows than this for each feature follow their targets, each fit further than the last
_MOST_COUNTED = 512  # features: 2,048 rows are a large batch whatever their width
_DUAL_ABOVE = 1024  # features up to which their own matrix costs little


@dataclass(frozen=True)
class BaselineBatch:
    """A batch as a fit sees it; the arguments of :func:`fit_baseline`. Kept, it enters later fits as well."""

    phi: Tensor
    phi_last: Tensor
    rewards: Tensor
    lengths: Tensor
    terminated: Tensor

    @cached_property
    def gram(self) -> Tensor:
        """Phi'Phi [F, F] in the precision of phi, computed once."""
        return gram_of(self.phi)


@dataclass(frozen=True)
class BaselineFit:
    """What one fit leaves: weights [F] for the next one, and the batch's values and advantages under the fit."""

    weights: Tensor
    valued_by: Tensor  # [F] the weights behind the values, which need not be those for the next fit
    values: Tensor  # [S] V(s_t)
    last_values: Tensor  # [N] V after each sample's last step, 0 where it terminated
    advantages: Tensor  # [S] GAE with these values, neither centred nor scaled
    explained_variance: float  # 1 - var(G - V) / var(G), G = V + A the lambda-returns of the same batch; at most 1


@torch.no_grad()
def fit_baseline(
    phi: Tensor,
    phi_last: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    terminated: Tensor,
    weights: Tensor | None,
    gamma: float,
    lam: float,
    ridge: float = 1e-3,
    sweeps: int = 2,
    earlier: Sequence[BaselineBatch] = (),
    level: bool = False,
) -> BaselineFit:
    """Fit V(s) = phi(s) . w to the batch's own lambda-returns and return the values and advantages it gives.

    phi [S, F], the last feature constant 1; phi_last [N, F] of the state after each sample's last step; rewards [S];
    lengths [N]; terminated [N] bool: True where nothing follows the last step, False where the episode was truncated or
    the batch cut, so that V(phi_last) stands in for the rest; weights [F] of the previous fit, None at the first.

    Each sweep regresses y = V + GAE(V), V from the weights so far, over n rows:
        w = (Phi'Phi + n r diag(max(diag(Phi'Phi) / n, 1e-3)))^-1 Phi'y        (constant feature: n 1e-6 instead)
        r = ridge max(1, 4 min(F, 512) / n)^2
    With four rows and more for each feature r is ``ridge``. With fewer it grows: the targets of a fit hold the values
    of the fit before, and one that follows them too closely sends the next further astray, without end.
    The matrix is the same in every sweep and factored once, in float64: [F, F] or, where there are more features than
    rows, [n, n], which gives the same w. Without previous weights V starts at 0 and two sweeps are added.

    ``earlier`` batches, of policies that differ little, enter the regression as further rows, with targets from the
    same weights: Phi'Phi and Phi'y are sums over batches. The more rows there are, the less of one batch's own noise is
    explained away. Values and advantages are those of the batch alone.

    ``level`` ends with V <- c V + a, (c, a) from :func:`fit_level` on the batch itself, so that its advantages have
    mean 0.

    Raises UsageError on shapes or settings that do not fit, TrainingError if the fit is not finite.
    """
    check_fit(phi, phi_last, rewards, lengths, terminated, weights)
    if ridge < 0.0 or sweeps < 1:
        raise UsageError(f"ridge must be at least 0 and sweeps at least 1, got {ridge} and {sweeps}.")
    batches = (BaselineBatch(phi, phi_last, rewards.to(phi.dtype), lengths, terminated), *earlier)
    if any(batch.phi.shape[1] != phi.shape[1] for batch in batches):
        raise UsageError(f"earlier batches must have the {phi.shape[1]} features of this one.")
    n = sum(len(batch.phi) for batch in batches)
    ridge *= max(1.0, _ROWS_A_FEATURE * min(phi.shape[1], _MOST_COUNTED) / n) ** 2
    solve = _dual(batches, ridge) if phi.shape[1] > max(n, _DUAL_ABOVE) else _primal(batches, ridge)
    own, *others = ((batch.phi_last, batch.rewards, batch.lengths, batch.terminated) for batch in batches)
    every = tuple(map(torch.cat, zip(own, *others, strict=True))) if others else own

    def evaluate(w: Tensor, values: Tensor, last: Tensor, r: Tensor, n: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        last_values = torch.where(ends, 0.0, last @ w)
        return last_values, gae(r, values, last_values, n, gamma, lam)

    w = phi.new_zeros(phi.shape[1]) if weights is None else weights.to(phi)
    for _ in range(sweeps if weights is not None else sweeps + 2):
        values = torch.cat([batch.phi @ w for batch in batches]) if others else phi @ w
        w = solve(values + evaluate(w, values, *every)[1])
    values = phi @ w
    last_values, advantages = evaluate(w, values, *own)
    if level:
        scale, shift = fit_level(values, last_values, rewards, lengths, terminated, gamma, lam)
        w = w * scale
        w[-1] += shift
        values = phi @ w
        last_values, advantages = evaluate(w, values, *own)
    if not bool(torch.isfinite(advantages).all()):
        raise TrainingError(
            f"the baseline fit is not finite ({phi.shape[1]} features, {n} steps): a reward or an observation "
            "is nan or too large, or batches of so few steps lead each fit further astray; check the environment, or "
            "raise n_steps (min_steps) or baseline_ridge."
        )
    return BaselineFit(w, w, values, last_values, advantages, explained(values, advantages))


def explained(values: Tensor, advantages: Tensor) -> float:
    """1 - var(A) / var(V + A): the share of the returns' variance that the values [S] account for."""
    spread = float((values + advantages).var(correction=0))
    return 1.0 - float(advantages.var(correction=0)) / spread if spread > 0.0 else 0.0


_Solve = Callable[[Tensor], Tensor]
"""From targets [n] to the weights [F] of their regression."""


def _primal(batches: Sequence[BaselineBatch], ridge: float) -> _Solve:
    factor = _factor(batches, ridge)
    phis = [batch.phi for batch in batches]

    def solve(targets: Tensor) -> Tensor:
        first, *others = (
            phi.T @ y for phi, y in zip(phis, torch.split(targets, [len(phi) for phi in phis]), strict=True)
        )
        moment = sum(others, start=first)
        return torch.cholesky_solve(moment.to(factor).unsqueeze(1), factor).squeeze(1).to(targets)

    return solve


def _dual(batches: Sequence[BaselineBatch], ridge: float) -> _Solve:
    """By the matrix [n, n]: (Phi'Phi + P)^-1 Phi' = P^-1 Phi' (Phi P^-1 Phi' + 1)^-1 for the diagonal penalty P."""
    rows = torch.cat([batch.phi for batch in batches]).to("cpu", torch.float64)
    penalty = _penalty(rows.square().sum(0), len(rows), ridge)
    gram = gram_of((rows / penalty.sqrt()).T)
    if not bool(torch.isfinite(gram).all()):
        raise TrainingError("the baseline's features are not finite; check the environment's observations.")
    gram.diagonal().add_(1.0)
    factor = torch.linalg.cholesky(gram)

    def solve(targets: Tensor) -> Tensor:
        weighed = torch.cholesky_solve(targets.to(factor).unsqueeze(1), factor).squeeze(1)
        return (rows.T @ weighed / penalty).to(targets)

    return solve


def _penalty(power: Tensor, n: int, ridge: float) -> Tensor:
    """[F]: what the ridge adds to the diagonal ``power`` [F] of Phi'Phi, n rows."""
    penalty = ridge * power.clamp(min=n * SMALLEST_POWER)
    penalty[-1] = n * _CONSTANT_RIDGE
    return penalty


def _factor(batches: Sequence[BaselineBatch], ridge: float) -> Tensor:
    """Cholesky factor [F, F], float64 on the CPU, of the regularised Gram matrix of the rows of all batches."""
    info = torch.ones(())
    n = sum(len(batch.phi) for batch in batches)
    for exact in (False, True):
        # float32 products are exact enough unless features all but coincide; then once more in float64.
        grams = (gram_of(batch.phi.cpu().double()) if exact else batch.gram for batch in batches)
        first, *others = (gram.to("cpu", torch.float64) for gram in grams)
        gram = sum(others, start=first)
        if not bool(torch.isfinite(gram).all()):
            raise TrainingError("the baseline's features are not finite; check the environment's observations.")
        gram.diagonal().add_(_penalty(gram.diagonal(), n, ridge))
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) == 0:
            return torch.as_tensor(factor)
    raise TrainingError(f"the baseline's features are linearly dependent and ridge={ridge} is too small; raise ridge.")


def gram_of(rows: Tensor) -> Tensor:
    """rows^T rows. On a CPU by numpy, which knows the result to be symmetric and computes one half of it."""
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        return rows.T @ rows
    array = rows.numpy()
    with np.errstate(all="ignore"):  # what overflows is looked for
        return torch.from_numpy(array.T @ array)


def check_fit(
    phi: Tensor,
    phi_last: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    terminated: Tensor,
    weights: Tensor | None,
) -> None:
    """Raises UsageError unless the arguments of a fit fit together."""
    total = check_packed(lengths, phi=phi, rewards=rewards)
    check_per_sample(lengths, phi_last=phi_last, terminated=terminated)
    if phi.ndim != 2 or phi_last.ndim != 2 or phi.shape[1] != phi_last.shape[1]:
        raise UsageError(
            f"phi and phi_last must be [S, F] and [N, F], got shapes {list(phi.shape)} and {list(phi_last.shape)}."
        )
    if weights is not None and weights.shape != phi.shape[1:]:
        raise UsageError(
            f"weights has shape {list(weights.shape)} but there are {phi.shape[1]} features; "
            "pass the weights of a fit with the same features, or None."
        )
    if terminated.dtype != torch.bool:
        raise UsageError(f"terminated must be a boolean tensor, got {terminated.dtype}; convert with .bool().")
    if total == 0:
        raise UsageError("the baseline needs at least one step, got none.")

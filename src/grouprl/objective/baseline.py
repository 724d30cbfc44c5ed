"""A state-dependent baseline in closed form: ridge regression on random features, refitted on every batch.

No network, no optimiser, no value loss: the return expected at a state is phi(state) . w, and w is solved for on the
group's own samples. To call a spade a spade: this is a linear critic, fitted by least squares instead of by gradient.
Sources: linear-feature baselines, Duan et al. 2016, arXiv 1604.06778; random features, Rahimi and Recht 2007;
generalised advantages, Schulman et al. 2016, arXiv 1506.02438.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.objective.packed import check_packed, check_per_sample
from grouprl.objective.returns import gae

_OBSERVATION_LIMIT = 10.0
_TIME_SCALE = 4.0  # elapsed lies in [0, 1]: stretched to the spread of a normalised observation
_SMALLEST_POWER = 1e-3  # of a feature, where the ridge is scaled by it: a feature that is all but 0 stays tame
_CONSTANT_RIDGE = 1e-6  # the mean return must not be shrunk; this only keeps the matrix regular
_ROWS_A_FEATURE = 4  # fewer rows than this for each feature follow their targets, each fit further than the last
_MOST_COUNTED = 512  # features: 2,048 rows are a large batch whatever their width
_DUAL_ABOVE = 1024  # features up to which their own matrix costs little


@dataclass(frozen=True)
class RandomFeatures:
    """phi(s, u) = [tanh((s, 4u) W + c), s, s^2, u, u^2, 1] with W and c drawn once and fixed.

    weight [D+1, d] ~ N(0, 1) / sqrt(max(1, D/4)) and offset [d] ~ U(-2, 2); D observation entries, d random features.
    """

    weight: Tensor
    offset: Tensor

    @classmethod
    def create(cls, n_observation: int, n_features: int, seed: int) -> "RandomFeatures":
        """Draw W and c; the same seed gives the same features. Raises UsageError if a size is below 1."""
        if n_observation < 1 or n_features < 1:
            raise UsageError(
                f"n_observation and n_features must be at least 1, got {n_observation} and {n_features}; "
                "128 features suit most tasks."
            )
        rng = np.random.default_rng(seed)
        weight = rng.standard_normal((n_observation + 1, n_features)) / math.sqrt(max(1.0, n_observation / 4.0))
        offset = rng.uniform(-2.0, 2.0, n_features)
        return cls(torch.from_numpy(weight).float(), torch.from_numpy(offset).float())

    @property
    def n_outputs(self) -> int:
        """F = d + 2 D + 3, the number of features including the constant, which is the last."""
        n_inputs, n_features = self.weight.shape
        return n_features + 2 * (n_inputs - 1) + 3

    @torch.no_grad()
    def __call__(self, observations: Tensor, elapsed: Tensor) -> Tensor:
        """[S, F] float32 from observations [S, D] and elapsed [S].

        Observations come normalised and are clipped to +-10; elapsed is the time in the episode over its horizon.
        Raises UsageError on shapes that do not fit.
        """
        hidden, s, u = self._parts(observations, elapsed)
        return torch.cat((hidden, s, s.square(), u, u.square(), torch.ones_like(u)), 1)

    @torch.no_grad()
    def dot(self, observations: Tensor, elapsed: Tensor, weights: Tensor) -> Tensor:
        """[S]: self(observations, elapsed) @ weights for weights [F], without laying the features side by side."""
        hidden, s, u = self._parts(observations, elapsed)
        w_hidden, w_s, w_square, w_time = torch.split(weights, [hidden.shape[1], s.shape[1], s.shape[1], 3])
        time = torch.cat((u, u.square(), torch.ones_like(u)), 1)
        return torch.mv(hidden, w_hidden).addmv_(s, w_s).addmv_(s.square(), w_square).addmv_(time, w_time)

    def _parts(self, observations: Tensor, elapsed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tanh((s, 4u) W + c) [S, d], s [S, D] and u [S, 1]."""
        n_observation = self.weight.shape[0] - 1
        if observations.ndim != 2 or observations.shape[1] != n_observation:
            raise UsageError(
                f"observations must have shape [S, {n_observation}], got {list(observations.shape)}; "
                "flatten each observation to one row."
            )
        if elapsed.shape != observations.shape[:1]:
            raise UsageError(
                f"elapsed must have shape [{observations.shape[0]}], one per observation, got {list(elapsed.shape)}."
            )
        s = observations.float().clamp(-_OBSERVATION_LIMIT, _OBSERVATION_LIMIT)
        u = elapsed.to(s).unsqueeze(1)
        weight, offset = self.weight.to(s.device), self.offset.to(s.device)
        # tanh(x) = 2 sigmoid(2x) - 1, which torch computes in a fraction of the time of tanh on a CPU.
        doubled = torch.addmm(offset, torch.cat((s, _TIME_SCALE * u), 1), weight, beta=2.0, alpha=2.0)
        return doubled.sigmoid_().mul_(2.0).sub_(1.0), s, u


@dataclass(frozen=True)
class Sketch:
    """Wide observations [S, D] as few sums [S, d]: each entry is added to one sum, with a random sign.

    A regression costs the square of its width, and reading a batch costs the width: beyond some hundred entries the
    first must not grow with the second. Scalar products stay the same in expectation. Source: feature hashing,
    Weinberger et al. 2009, arXiv 0902.2206.

    order [d * ceil(D / d)] holds the entries in the order in which they are dealt out to the sums, D for none;
    sign [D].
    """

    order: Tensor
    sign: Tensor
    n_sums: int

    @classmethod
    def create(cls, n_observation: int, n_sums: int, seed: int) -> "Sketch":
        """Draw order and signs; the same seed gives the same."""
        rng = np.random.default_rng([seed, n_observation, n_sums])
        order = np.full(n_sums * -(-n_observation // n_sums), n_observation)
        order[:n_observation] = rng.permutation(n_observation)
        sign = rng.choice(np.array([-1, 1], np.float32), n_observation)
        return cls(torch.from_numpy(order), torch.from_numpy(sign), n_sums)

    @torch.no_grad()
    def __call__(self, observations: Tensor) -> Tensor:
        """[S, d] float32 from observations [S, D], clipped to +-10 first."""
        s = observations.float().clamp(-_OBSERVATION_LIMIT, _OBSERVATION_LIMIT) * self.sign.to(observations.device)
        s = torch.nn.functional.pad(s, (0, 1))
        dealt = s.index_select(1, self.order.to(s.device)).view(len(s), -1, self.n_sums)
        return dealt.sum(1) / math.sqrt(dealt.shape[1])


@dataclass(frozen=True)
class BaselineFit:
    """What one fit leaves: weights [F] for the next one, and the batch's values and advantages under the fit."""

    weights: Tensor
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

    Raises UsageError on shapes or settings that do not fit, TrainingError if the fit is not finite.
    """
    _check(phi, phi_last, rewards, lengths, terminated, weights, ridge, sweeps)
    ridge *= max(1.0, _ROWS_A_FEATURE * min(phi.shape[1], _MOST_COUNTED) / len(phi)) ** 2
    solve = _dual(phi, ridge) if phi.shape[1] > max(phi.shape[0], _DUAL_ABOVE) else _primal(phi, ridge)

    def evaluate(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = phi @ w
        last_values = torch.where(terminated, 0.0, phi_last @ w)
        return values, last_values, gae(rewards, values, last_values, lengths, gamma, lam)

    rewards = rewards.to(phi.dtype)
    w = phi.new_zeros(phi.shape[1]) if weights is None else weights.to(phi)
    for _ in range(sweeps if weights is not None else sweeps + 2):
        values, _, advantages = evaluate(w)
        w = solve(values + advantages)
    values, last_values, advantages = evaluate(w)
    if not bool(torch.isfinite(advantages).all()):
        raise TrainingError(
            f"the baseline fit is not finite ({phi.shape[1]} features, {len(phi)} steps): a reward or an observation "
            "is nan or too large, or batches of so few steps lead each fit further astray; check the environment, or "
            "raise n_steps (min_steps) or baseline_ridge."
        )
    spread = float((values + advantages).var(correction=0))
    explained = 1.0 - float(advantages.var(correction=0)) / spread if spread > 0.0 else 0.0
    return BaselineFit(w, values, last_values, advantages, explained)


_Solve = Callable[[Tensor], Tensor]
"""From targets [n] to the weights [F] of their regression."""


def _primal(phi: Tensor, ridge: float) -> _Solve:
    factor = _factor(phi, ridge)

    def solve(targets: Tensor) -> Tensor:
        moment = phi.T @ targets
        return torch.cholesky_solve(moment.to(factor).unsqueeze(1), factor).squeeze(1).to(phi)

    return solve


def _dual(phi: Tensor, ridge: float) -> _Solve:
    """By the matrix [n, n]: (Phi'Phi + P)^-1 Phi' = P^-1 Phi' (Phi P^-1 Phi' + 1)^-1 for the diagonal penalty P."""
    rows = phi.to("cpu", torch.float64)
    penalty = _penalty(rows.square().sum(0), len(rows), ridge)
    gram = _gram((rows / penalty.sqrt()).T)
    if not bool(torch.isfinite(gram).all()):
        raise TrainingError("the baseline's features are not finite; check the environment's observations.")
    gram.diagonal().add_(1.0)
    factor = torch.linalg.cholesky(gram)

    def solve(targets: Tensor) -> Tensor:
        weighed = torch.cholesky_solve(targets.to(factor).unsqueeze(1), factor).squeeze(1)
        return (rows.T @ weighed / penalty).to(phi)

    return solve


def _penalty(power: Tensor, n: int, ridge: float) -> Tensor:
    """[F]: what the ridge adds to the diagonal ``power`` [F] of Phi'Phi, n rows."""
    penalty = ridge * power.clamp(min=n * _SMALLEST_POWER)
    penalty[-1] = n * _CONSTANT_RIDGE
    return penalty


def _factor(phi: Tensor, ridge: float) -> Tensor:
    """Cholesky factor [F, F], float64 on the CPU, of the regularised Gram matrix of phi [n, F]."""
    info = torch.ones(())
    for dtype in (phi.dtype, torch.float64):
        # float32 products are exact enough unless features all but coincide; then once more in float64.
        rows = phi if dtype == phi.dtype else phi.cpu().to(dtype)
        gram = _gram(rows).to("cpu", torch.float64)
        if not bool(torch.isfinite(gram).all()):
            raise TrainingError("the baseline's features are not finite; check the environment's observations.")
        gram.diagonal().add_(_penalty(gram.diagonal(), rows.shape[0], ridge))
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) == 0:
            return torch.as_tensor(factor)
    raise TrainingError(f"the baseline's features are linearly dependent and ridge={ridge} is too small; raise ridge.")


def _gram(rows: Tensor) -> Tensor:
    """rows^T rows. On a CPU by numpy, which knows the result to be symmetric and computes one half of it."""
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        return rows.T @ rows
    array = rows.numpy()
    with np.errstate(all="ignore"):  # what overflows is looked for
        return torch.from_numpy(array.T @ array)


def _check(
    phi: Tensor,
    phi_last: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    terminated: Tensor,
    weights: Tensor | None,
    ridge: float,
    sweeps: int,
) -> None:
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
    if ridge < 0.0 or sweeps < 1:
        raise UsageError(f"ridge must be at least 0 and sweeps at least 1, got {ridge} and {sweeps}.")

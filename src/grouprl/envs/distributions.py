"""Action distributions as pure functions of parameter rows: sampled in numpy, differentiated in torch.

A distribution holds no parameters. Rows of parameters ([n, K], one row per step) come from a policy network; collection
draws actions from them with numpy, where a call costs microseconds, and learning evaluates log-probability, entropy and
KL divergence with torch, in as few operations as possible.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad, softplus

from grouprl.errors import UsageError
from grouprl.objective.divergences import bernoulli_kl, categorical_kl, gaussian_kl

Array: TypeAlias = npt.NDArray[Any]
ArrayOrTensor = TypeVar("ArrayOrTensor", Array, torch.Tensor)

MASKED_LOGIT = -1e8
"""Logit of a masked action: its probability is exactly 0 in float32, and 0 * log-probability is 0, not NaN."""

_PADDING_LOGIT = -1e30  # far below MASKED_LOGIT, so that padding stays at probability 0 even in a fully masked row
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


_quietly = np.errstate(all="ignore")
"""What underflows in a probability is 0, also for someone who has asked NumPy to raise."""


def _bernoulli_draws(logits: Array, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """True with probability sigmoid(logits), any shape."""
    # sigmoid(x) = (1 + tanh(x / 2)) / 2, and tanh saturates at exactly -1 and 1 where exp would overflow: with
    # v uniform on [-1, 1), v < -1 never and v < 1 always. float64 keeps small probabilities.
    uniform = rng.random(logits.shape)
    uniform *= 2.0
    uniform -= 1.0
    threshold = np.multiply(logits, 0.5, dtype=np.float64)
    np.tanh(threshold, out=threshold)
    draws: npt.NDArray[np.bool_] = uniform < threshold
    return draws


def _categorical_draws(logits: Array, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """One index per row of logits [n, K], by inverse transform; an index of probability 0 is never drawn."""
    n_actions = logits.shape[1]
    if n_actions == 2:
        return _bernoulli_draws(np.subtract(logits[:, 1], logits[:, 0], dtype=np.float64), rng).astype(np.int64)
    # Transposed, so that each numpy operation runs along the long axis (n) and not along the short one (K).
    weights = np.array(logits.T, order="C")
    weights -= weights.max(axis=0)
    np.exp(weights, out=weights)
    cumulative = np.cumsum(weights, axis=0, dtype=np.float64)
    threshold = rng.random(logits.shape[0])
    # The largest uniform below 1 times the total rounds to below the total, so the count is at most K - 1. The first
    # cumulative weight above the threshold cannot belong to an index of weight 0: it equals the one before it.
    threshold *= cumulative[-1]
    draws: npt.NDArray[np.int64] = (cumulative <= threshold).sum(axis=0, dtype=np.int64)
    return draws


def _masked(params: ArrayOrTensor, mask: Any) -> ArrayOrTensor:
    if isinstance(params, torch.Tensor):
        allowed = torch.as_tensor(mask, dtype=torch.bool, device=params.device)
        return params.masked_fill(~allowed, MASKED_LOGIT)
    return np.where(np.asarray(mask, dtype=np.bool_), params, np.asarray(MASKED_LOGIT, dtype=params.dtype))


def _no_masks(name: str) -> UsageError:
    return UsageError(
        f"An action mask was given for a {name} policy, which has no finite set of actions to mask. Masks are allowed "
        "for Discrete and MultiDiscrete action spaces; remove the mask, or make the action space one of these."
    )


def _mask_rows(mask: Any, size: int) -> npt.NDArray[np.bool_]:
    rows = np.asarray(mask, dtype=np.bool_)
    if rows.ndim != 2 or rows.shape[1] != size:
        raise UsageError(
            f"An action mask of shape {rows.shape} was given; allowed is (n, {size}): one row per environment, one "
            "entry per action, nonzero where the action is allowed."
        )
    return rows


@dataclass(frozen=True)
class Categorical:
    """One of ``n`` actions; parameters are logits [S, n], actions int64 [S]."""

    n: int

    @property
    def n_params(self) -> int:
        """Numbers per parameter row."""
        return self.n

    @_quietly
    def sample(self, params: Array, rng: np.random.Generator) -> Array:
        """Draw actions int64 [n] from logits [n, K]; an action of probability 0 is never drawn."""
        return _categorical_draws(params, rng)

    def mode(self, params: Array) -> Array:
        """Most probable actions, int64 [n], for logits [n, K]; the first of equals."""
        modes: Array = params.argmax(axis=1)
        return modes

    def log_prob(self, params: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [m] of actions int64 [m] under logits [m, K]."""
        # Transposed, so that vectors lie along the long axis (m) and not along the short one (K).
        return params.t().log_softmax(0).gather(0, actions.unsqueeze(0)).squeeze(0)

    def entropy(self, params: torch.Tensor) -> torch.Tensor:
        """Entropies [m] in nats of logits [m, K]."""
        log_probs = params.t().log_softmax(0)
        return -(log_probs.exp() * log_probs).sum(0)

    def kl(self, params_p: torch.Tensor, params_q: torch.Tensor) -> torch.Tensor:
        """Exact KL(p || q), [m], in nats."""
        return categorical_kl(params_p, params_q)

    def apply_mask(self, params: ArrayOrTensor, mask: Any) -> ArrayOrTensor:
        """Logits [n, K] with those of forbidden actions (False in mask [n, K]) set to MASKED_LOGIT."""
        return _masked(params, mask)

    def check_mask(self, mask: Any) -> None:
        """Raise UsageError unless mask is [n, K] and every row allows at least one action."""
        bad = np.flatnonzero(~_mask_rows(mask, self.n).any(axis=1))
        if bad.size:
            raise UsageError(
                f"The action mask of environment {bad[0]} forbids all {self.n} actions; allowed is a mask with at "
                "least one action left. End the episode in the environment when no action is possible."
            )


@lru_cache(maxsize=64)
def _padding_index(nvec: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Column of each component's each logit, [A, max(nvec)]; the column after the last logit stands for padding."""
    widest, total = max(nvec), sum(nvec)
    index = np.full((len(nvec), widest), total, dtype=np.int64)
    start = 0
    for row, n in enumerate(nvec):
        index[row, :n] = np.arange(start, start + n)
        start += n
    return index


@dataclass(frozen=True)
class MultiCategorical:
    """Independent choices, one of ``nvec[i]`` each; parameters are the concatenated logits [S, sum nvec], actions
    int64 [S, A] with A = len(nvec). Log-probability, entropy and KL are sums over the components."""

    nvec: tuple[int, ...]

    @property
    def n_params(self) -> int:
        """Numbers per parameter row."""
        return sum(self.nvec)

    @_quietly
    def sample(self, params: Array, rng: np.random.Generator) -> Array:
        """Draw actions int64 [n, A] from logits [n, K]; an action of probability 0 is never drawn."""
        rows = self._rows(params)
        return _categorical_draws(rows.reshape(-1, rows.shape[2]), rng).reshape(rows.shape[:2])

    def mode(self, params: Array) -> Array:
        """Most probable actions, int64 [n, A], for logits [n, K]; the first of equals."""
        modes: Array = self._rows(params).argmax(axis=2)
        return modes

    def log_prob(self, params: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [m] of actions int64 [m, A] under logits [m, K]."""
        log_probs = self._tensor_rows(params).log_softmax(-1)
        return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self, params: torch.Tensor) -> torch.Tensor:
        """Entropies [m] in nats of logits [m, K]."""
        log_probs = self._tensor_rows(params).log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum((-2, -1))

    def kl(self, params_p: torch.Tensor, params_q: torch.Tensor) -> torch.Tensor:
        """Exact KL(p || q), [m], in nats."""
        rows_p, rows_q = self._tensor_rows(params_p), self._tensor_rows(params_q)
        return categorical_kl(rows_p.flatten(0, 1), rows_q.flatten(0, 1)).reshape(rows_p.shape[:2]).sum(-1)

    def apply_mask(self, params: ArrayOrTensor, mask: Any) -> ArrayOrTensor:
        """Logits [n, K] with those of forbidden choices (False in mask [n, K]) set to MASKED_LOGIT."""
        return _masked(params, mask)

    def check_mask(self, mask: Any) -> None:
        """Raise UsageError unless mask is [n, K] and every component of every row keeps at least one choice."""
        starts = np.cumsum((0, *self.nvec[:-1]))
        allowed = np.logical_or.reduceat(_mask_rows(mask, self.n_params), starts, axis=1)
        bad = np.argwhere(~allowed)
        if bad.size:
            raise UsageError(
                f"The action mask of environment {bad[0, 0]} forbids every choice of component {bad[0, 1]} of the "
                f"MultiDiscrete({list(self.nvec)}) action; allowed is a mask with at least one choice left in each "
                "component. End the episode in the environment when no action is possible."
            )

    def _rows(self, params: Array) -> Array:
        """Logits [n, A, max(nvec)], short components padded."""
        if len(set(self.nvec)) == 1:
            return params.reshape(len(params), len(self.nvec), self.nvec[0])
        padded = np.full((len(params), params.shape[1] + 1), _PADDING_LOGIT, dtype=params.dtype)
        padded[:, :-1] = params
        rows: Array = padded[:, _padding_index(self.nvec)]
        return rows

    def _tensor_rows(self, params: torch.Tensor) -> torch.Tensor:
        if len(set(self.nvec)) == 1:
            return params.reshape(-1, len(self.nvec), self.nvec[0])
        index = torch.from_numpy(_padding_index(self.nvec)).to(params.device)
        return pad(params, (0, 1), value=_PADDING_LOGIT)[:, index]


@dataclass(frozen=True)
class DiagonalGaussian:
    """``n`` independent normals; parameters are [mean (n), log_std (n)], [S, 2 n], actions float32 [S, n].

    Log-probability, entropy and KL are sums over the components."""

    n: int

    @property
    def n_params(self) -> int:
        """Numbers per parameter row."""
        return 2 * self.n

    @_quietly
    def sample(self, params: Array, rng: np.random.Generator) -> Array:
        """Draw actions float32 [n, A]: mean + std * standard normal."""
        draws: Array = rng.standard_normal((len(params), self.n), dtype=np.float32)
        draws *= np.exp(params[:, self.n :])
        draws += params[:, : self.n]
        return draws

    def mode(self, params: Array) -> Array:
        """Means [n, A] (a view)."""
        return params[:, : self.n]

    def log_prob(self, params: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-densities [m] of actions [m, A]."""
        mean, log_std = params[:, : self.n], params[:, self.n :]
        z: torch.Tensor = (actions - mean) * (-log_std).exp()
        return (-0.5 * z.square() - log_std).sum(-1) - self.n * _HALF_LOG_2PI

    def entropy(self, params: torch.Tensor) -> torch.Tensor:
        """Differential entropies [m] in nats."""
        return params[:, self.n :].sum(-1) + self.n * (0.5 + _HALF_LOG_2PI)

    def kl(self, params_p: torch.Tensor, params_q: torch.Tensor) -> torch.Tensor:
        """Exact KL(p || q), [m], in nats."""
        n = self.n
        return gaussian_kl(params_p[:, :n], params_p[:, n:], params_q[:, :n], params_q[:, n:])

    def apply_mask(self, params: ArrayOrTensor, mask: Any) -> ArrayOrTensor:
        """Raise UsageError: continuous actions cannot be masked."""
        raise _no_masks("Gaussian")

    def check_mask(self, mask: Any) -> None:
        """Raise UsageError: continuous actions cannot be masked."""
        raise _no_masks("Gaussian")


@dataclass(frozen=True)
class IndependentBernoulli:
    """``n`` independent switches; parameters are logits of being on, [S, n], actions float32 [S, n] of 0 and 1.

    Log-probability, entropy and KL are sums over the components."""

    n: int

    @property
    def n_params(self) -> int:
        """Numbers per parameter row."""
        return self.n

    @_quietly
    def sample(self, params: Array, rng: np.random.Generator) -> Array:
        """Draw actions float32 [n, A] of 0 and 1."""
        return _bernoulli_draws(params, rng).astype(np.float32)

    def mode(self, params: Array) -> Array:
        """Most probable actions float32 [n, A]; 0 at probability one half."""
        return (params > 0).astype(np.float32)

    def log_prob(self, params: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [m] of actions [m, A]."""
        return -binary_cross_entropy_with_logits(params, actions.to(params.dtype), reduction="none").sum(-1)

    def entropy(self, params: torch.Tensor) -> torch.Tensor:
        """Entropies [m] in nats."""
        return (softplus(params) - params * params.sigmoid()).sum(-1)

    def kl(self, params_p: torch.Tensor, params_q: torch.Tensor) -> torch.Tensor:
        """Exact KL(p || q), [m], in nats."""
        return bernoulli_kl(params_p, params_q)

    def apply_mask(self, params: ArrayOrTensor, mask: Any) -> ArrayOrTensor:
        """Raise UsageError: MultiBinary actions cannot be masked."""
        raise _no_masks("Bernoulli")

    def check_mask(self, mask: Any) -> None:
        """Raise UsageError: MultiBinary actions cannot be masked."""
        raise _no_masks("Bernoulli")


Distribution: TypeAlias = Categorical | MultiCategorical | DiagonalGaussian | IndependentBernoulli

"""Features of states that are drawn once and fixed: what the closed-form baseline is linear in.

Source: random features, Rahimi and Recht 2007.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grouprl.errors import UsageError

_OBSERVATION_LIMIT = 10.0
_COSINE_SCALE = 0.25
_LATEST = 1.0
_TIME_SCALE = 4.0  # elapsed lies in [0, 1]: stretched to the spread of a normalised observation


@dataclass(frozen=True)
class RandomFeatures:
    """phi(s, u) = [f((s, 4u) W + c), s, s^2, u, u^2, 1] with W and c drawn once and fixed; f is tanh or cos.

    weight [D+1, d] and offset [d], for D observation entries and d random features:
        tanh:   N(0, 1) / sqrt(max(1, D/4)),          U(-2, 2)
        cosine: N(0, 1) / (4 sqrt(max(1, D/4))),      U(-pi, pi)
    Cosines vary slowly, over about 2 sqrt(D) deviations of an observation: a regression on them is smooth.

    The time u of a step is at most 1. Where episodes outlast what is taken for their horizon, a time that went on
    growing would drown the observation within f.
    """

    weight: Tensor
    offset: Tensor
    cosine: bool = False

    @classmethod
    def create(cls, n_observation: int, n_features: int, seed: int, cosine: bool = False) -> "RandomFeatures":
        """Draw W and c; the same seed gives the same features. Raises UsageError if a size is below 1."""
        if n_observation < 1 or n_features < 1:
            raise UsageError(
                f"n_observation and n_features must be at least 1, got {n_observation} and {n_features}; "
                "128 features suit most tasks."
            )
        rng = np.random.default_rng(seed)
        weight = rng.standard_normal((n_observation + 1, n_features)) / math.sqrt(max(1.0, n_observation / 4.0))
        widest = math.pi if cosine else 2.0
        offset = rng.uniform(-widest, widest, n_features)
        if cosine:
            weight *= _COSINE_SCALE
        return cls(torch.from_numpy(weight).float(), torch.from_numpy(offset).float(), cosine)

    @property
    def n_outputs(self) -> int:
        """F = d + 2 D + 3, the number of features including the constant, which is the last."""
        n_inputs, n_features = self.weight.shape
        return n_features + 2 * (n_inputs - 1) + 3

    @torch.no_grad()
    def __call__(self, observations: Tensor, elapsed: Tensor) -> Tensor:
        """[S, F] float32 from observations [S, D] and elapsed [S].

        Observations come normalised and are clipped to +-10; elapsed is the time in the episode over its horizon, and
        counts as 1 beyond it.
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
        """f((s, 4u) W + c) [S, d], s [S, D] and u [S, 1]."""
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
        u = elapsed.to(s).clamp(max=_LATEST).unsqueeze(1)
        weight, offset = self.weight.to(s.device), self.offset.to(s.device)
        inputs = torch.cat((s, _TIME_SCALE * u), 1)
        if self.cosine:
            return torch.addmm(offset, inputs, weight).cos_(), s, u
        # tanh(x) = 2 sigmoid(2x) - 1, which torch computes in a fraction of the time of tanh on a CPU.
        doubled = torch.addmm(offset, inputs, weight, beta=2.0, alpha=2.0)
        return doubled.sigmoid_().mul_(2.0).sub_(1.0), s, u


@dataclass(frozen=True)
class Sketch:
    """Wide observations [S, D] as few sums [S, d]: each entry is added to one sum, with a random sign.

    A regression costs the square of its width, and reading a batch costs the width: beyond some hundred entries the
    first must not grow with the second. Scalar products become 1 / ceil(D / d) of what they were, in expectation.
    Source: feature hashing, Weinberger et al. 2009, arXiv 0902.2206.

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

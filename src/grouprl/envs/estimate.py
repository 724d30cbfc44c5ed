"""From a rollout to advantages: which estimator of :mod:`grouprl.objective` runs, on which features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from grouprl import objective
from grouprl.envs.baseline_memory import BaselineMemory, Seen, parts_of
from grouprl.envs.config import GRPOConfig
from grouprl.envs.rollout import Rollout
from grouprl.errors import TrainingError
from grouprl.objective import ESTIMATORS, RandomFeatures, Sketch
from grouprl.objective.estimators import Estimation
from grouprl.objective.packed import position, segment_ids
from grouprl.objective.user_functions import TensorFunction, own_advantages

DEFAULT_HORIZON = 1000
"""Steps that scale the time feature where the environment names no time limit."""

MAX_FIT_STEPS = 8192
CHUNK = 8192
CHUNK_NUMBERS = 2**23
"""Numbers of images, or of wide observations, that are summed up at once."""

WIDE, SKETCHED = 1024, 512
"""Numbers of a summary up to which it enters the regression as it is, and sums that stand for a wider one."""

GOLDEN_RATIO = (5**0.5 - 1) / 2

SAME_RETURN_BELOW = 1e-6
"""Relative difference up to which returns summed in float32 count as equal."""


@dataclass
class Baseline:
    """The closed-form group baseline: fixed random features and the weights of the last regression."""

    features: RandomFeatures
    horizon: int
    """Steps of an episode, by which the time in it is divided; later steps count as the last one of these."""
    weights: Tensor | None = None
    sketch: Sketch | None = None
    """Of a summary that is too wide for the features."""
    memory: BaselineMemory = field(default_factory=lambda: BaselineMemory(0))

    @classmethod
    def create(cls, width: int, config: GRPOConfig, horizon: int) -> Baseline:
        """For a :func:`summary` of ``width`` numbers; no weights yet."""
        sketch = Sketch.create(width, SKETCHED, config.seed) if width > WIDE else None
        width = width if sketch is None else SKETCHED
        features = RandomFeatures.create(width, config.baseline_features, config.seed, config.baseline_cosine)
        return cls(features, horizon, sketch=sketch, memory=BaselineMemory(config.baseline_memory))

    def seen(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the features are made of: the summary of ``m`` prepared inputs, or its sketch, ``[m, D]``."""
        if self.sketch is None and list(inputs) == ["flat"]:
            return inputs["flat"]
        rows, width = len(next(iter(inputs.values()))), sum(value[0].numel() for value in inputs.values() if len(value))
        made = []
        for start in range(0, rows, max(1, CHUNK_NUMBERS // max(1, width))):
            stop = start + max(1, CHUNK_NUMBERS // max(1, width))
            part = summary({key: value[start:stop] for key, value in inputs.items()})
            made.append(part if self.sketch is None else self.sketch(part))
        return torch.cat(made) if len(made) != 1 else made[0]

    def phi(self, seen: Tensor, elapsed: Tensor) -> Tensor:
        """Features ``[m, F]`` of what :meth:`seen` gives and the steps since the start of the episode ``[m]``."""
        return self.features(seen, elapsed.float() / self.horizon)

    def values(self, inputs: Mapping[str, Tensor], elapsed: Tensor) -> Tensor:
        """Values ``[m]`` under the last regression, a chunk of rows at a time."""
        assert self.weights is not None
        return self._values(inputs, elapsed, self.weights)

    def _values(self, inputs: Mapping[str, Tensor], elapsed: Tensor, weights: Tensor) -> Tensor:
        values = []
        for start in range(0, elapsed.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            observations = self.seen({key: value[rows] for key, value in inputs.items()})
            values.append(self.features.dot(observations, elapsed[rows].float() / self.horizon, weights))
        return torch.cat(values)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it: the weights, and the batches in memory; nothing before the first fit."""
        if self.weights is None:
            return {}
        return {"weights": self.weights} | {f"kept.{name}": value for name, value in self.memory.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self.weights = state.get("weights")
        self.memory.load(parts_of(state, "kept."), self.phi)

    def fit(self, rollout: Rollout, config: GRPOConfig) -> tuple[Tensor, Tensor, float]:
        """Refit on the rollout; values ``[S]``, advantages ``[S]`` neither centred nor scaled, the variance explained.

        Of a batch of more than ``MAX_FIT_STEPS`` steps some whole samples enter the regression: that many steps
        over-determine a few hundred weights many times, and the regression is what an estimate costs. What entered
        it is kept for the regressions of the next batches, if there is a memory.
        """
        samples, steps = fit_subset(rollout.lengths)
        every = steps.shape[0] == rollout.n_steps

        def part(tensors: Mapping[str, Tensor], index: Tensor) -> Mapping[str, Tensor]:
            return tensors if every else {key: value[index] for key, value in tensors.items()}

        seen = Seen(
            self.seen(part(rollout.inputs, steps)),
            rollout.elapsed[steps],
            self.seen(part(rollout.last_inputs, samples)),
            rollout.last_elapsed[samples],
            rollout.rewards[steps],
            rollout.lengths[samples],
            rollout.terminated[samples],
        )
        batch = seen.batch(self.phi)
        given = (
            batch.phi, batch.phi_last, batch.rewards, batch.lengths, batch.terminated, self.weights, config.gamma,
            config.gae_lambda,
        )  # fmt: skip
        if config.baseline_pull is None:
            fit = objective.fit_baseline(
                *given, ridge=config.baseline_ridge, sweeps=config.baseline_sweeps, earlier=tuple(self.memory),
                level=config.baseline_level,
            )  # fmt: skip
        else:
            fit = objective.fit_pulled_baseline(*given, pull=config.baseline_pull)
        self.weights = fit.weights
        if self.memory.rows:
            self.memory.add(seen, batch)
        values, advantages = fit.values, fit.advantages
        if not every:
            after = self._values(rollout.last_inputs, rollout.last_elapsed, fit.valued_by)
            last = torch.where(rollout.terminated, 0.0, after)
            values = self._values(rollout.inputs, rollout.elapsed, fit.valued_by)
            advantages = objective.gae(rollout.rewards, values, last, rollout.lengths, config.gamma, config.gae_lambda)
        lowest, highest = torch.aminmax(values + advantages)
        if float(highest - lowest) <= SAME_RETURN_BELOW * float(torch.maximum(highest.abs(), lowest.abs())):
            # What the ridge leaves over of equal returns is no signal; scaled to unit variance it would pass for one.
            advantages = torch.zeros_like(advantages)
        return values, advantages, fit.explained_variance


def fit_subset(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Samples, spread evenly over the batch, of about ``MAX_FIT_STEPS`` steps in all, and those steps: two indices.

    All of them where the batch is no larger.
    """
    n = lengths.shape[0]
    total = int(lengths.sum())
    if total <= MAX_FIT_STEPS:
        return torch.arange(n), torch.arange(total)
    spread = torch.argsort((torch.arange(n, dtype=torch.float64) * GOLDEN_RATIO) % 1.0)
    enough = int((torch.cumsum(lengths[spread], 0) <= MAX_FIT_STEPS).sum())
    samples = spread[: max(1, enough)].sort().values
    first = torch.cumsum(lengths, 0) - lengths
    steps = torch.repeat_interleave(first[samples], lengths[samples]) + objective.position(lengths[samples])
    return samples, steps


def summary(inputs: Mapping[str, Tensor]) -> Tensor:
    """The flat part of the inputs beside every image pooled to 8 x 8 per channel and centred, ``[m, D]``."""
    parts = [inputs["flat"]] if "flat" in inputs else []
    for key, value in inputs.items():
        if key != "flat":
            pooled = adaptive_avg_pool2d(value.float() / 127.5 - 1.0, 8)
            parts.append(pooled.flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def n_summary(n_flat: int, images: dict[str, tuple[int, int, int]]) -> int:
    """Width of :func:`summary`."""
    return n_flat + sum(64 * channels for channels, _, _ in images.values())


def states(rollout: Rollout) -> Tensor:
    """``[S]`` int64, equal where the observations acted on are, number for number and before normalisation."""
    raw = {} if rollout.observed is None else {"flat": rollout.observed}
    parts = [raw.get(key, value.numpy()) for key, value in rollout.inputs.items()]
    parts = [np.ascontiguousarray(part + 0.0 if part.dtype.kind == "f" else part) for part in parts]  # -0 is 0
    numbers: dict[bytes, int] = {}
    found = []
    for row in zip(*parts, strict=True):
        seen = blake2b(digest_size=16)  # of images, many rows would not fit into memory
        for part in row:
            seen.update(part)
        found.append(numbers.setdefault(seen.digest(), len(numbers)))
    return torch.tensor(found, dtype=torch.int64)


def has_signal(rollout: Rollout) -> bool:
    """Whether the rewards could tell one policy from another: they differ, or a non-zero one came less often.

    Where all are equal it is the length of an episode that counts. One that terminated ended early. One that was
    truncated did if another sample of the batch got further: a time limit cuts all of them at the same step.
    """
    rewards = rollout.rewards
    if bool(rewards.max() > rewards.min()):
        return True
    if float(rewards[0]) == 0.0:
        return False
    if bool(rollout.terminated.any()):
        return True
    cut = rollout.last_elapsed[rollout.truncated]
    return bool(len(cut)) and bool(cut.min() < rollout.last_elapsed.max())


OFFERED = ("observations", "values", "states", "gamma", "terminated", "truncated", "elapsed", "trainable")
"""What a user's estimator may ask for by name."""


def offers(rollout: Rollout, config: GRPOConfig, baseline: Baseline | None) -> dict[str, Callable[[], Any]]:
    """How to make what :data:`OFFERED` names, of a rollout of N samples and S steps.

    ``observations``: the flat observations as the environment gave them, ``[S, D]`` float32, or a mapping of prepared
    inputs where there are images. ``values``: ``[S]`` under the closed-form baseline, fitted to the rollout.
    ``states``: ``[S]``, see :func:`states`. ``gamma``: the discount of the batch.
    ``terminated``, ``truncated``: ``[N]`` bool. ``elapsed``: ``[S]`` steps since the start of the episode.
    ``trainable``: ``[S]`` bool, False for repeated actions, from which nothing is learned.
    """

    def observations() -> Any:
        whole = rollout.observed is not None and list(rollout.inputs) == ["flat"]
        return torch.as_tensor(rollout.observed, dtype=torch.float32) if whole else dict(rollout.inputs)

    def values() -> Tensor:
        assert baseline is not None
        return baseline.fit(rollout, config)[0]

    made: dict[str, Callable[[], Any]] = {
        "observations": observations,
        "values": values,
        "states": lambda: states(rollout),
        "gamma": lambda: config.gamma,
    }
    return made | {name: functools.partial(getattr, rollout, name) for name in OFFERED if name not in made}


def advantages(
    rollout: Rollout, config: GRPOConfig, baseline: Baseline | None, own: TensorFunction | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Advantages ``[S]`` on the scale the surrogate sees, and what is worth logging about them.

    ``own`` is a function of the user's, in the place of ``config.advantage``; what it returns is used as it is.

    Where its entry in ``ESTIMATORS`` says so, they are centred and scaled once over the trainable steps of the batch
    (those of samples that were compared and found equal stay 0);
    where earlier batches are reused, that is left to :class:`~grouprl.envs.reuse.Reuse`, which sees all of them.
    """
    rewards, lengths, group = rollout.rewards, rollout.lengths, rollout.group
    if own is not None:
        return own_advantages(own, rewards, lengths, group, offers(rollout, config, baseline)), {}
    estimator, info = ESTIMATORS[config.advantage], {}
    if estimator.function is None:
        assert baseline is not None
        _, raw, info["explained_variance"] = baseline.fit(rollout, config)
    else:
        told = Estimation(config.gamma, config.scale_rewards, gigpo_weight=config.gigpo_weight)
        if estimator.states:
            told = replace(told, states=states(rollout))
            assert told.states is not None
            info["shared_states"] = objective.shared_states(lengths, group, told.states)
        raw = estimator.function(rewards, lengths, group, told)
    if estimator.compares:
        info["degenerate_groups"] = objective.degenerate_fraction(rewards, lengths, group)
    scaled = estimator.standardised and config.reuse == 1
    finite = bool(torch.isfinite(raw).all())
    made = objective.standardise(raw, rollout.trainable) if scaled and finite else raw
    if scaled and estimator.compares:  # what equal returns do not tell apart is not shifted either
        made = torch.where(_all_zero(raw, lengths, group, by_time=estimator.turns), 0.0, made)
    if not (finite and bool(torch.isfinite(made).all())):
        raise TrainingError(
            f"advantage={config.advantage!r} gave an advantage that is not finite, for rewards from "
            f"{float(rewards.min())} to {float(rewards.max())}; scale the rewards, or choose another estimator"
        )
    return made, info


def _all_zero(advantages: Tensor, lengths: Tensor, group: Tensor, by_time: bool) -> Tensor:
    """``[S]`` bool: whether all steps of the group have advantage 0; by_time: all of those at the same time in it."""
    cells = group[segment_ids(lengths)]
    if by_time:
        cells = cells * (int(lengths.max()) + 1) + position(lengths)
    _, cell = torch.unique(cells, return_inverse=True)
    others = torch.zeros(len(cell), device=cell.device).index_add(0, cell, (advantages != 0).float())
    return others[cell] == 0

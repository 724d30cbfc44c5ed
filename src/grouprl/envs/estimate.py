"""From a rollout to advantages: which estimator of :mod:`grouprl.objective` runs, on which features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from grouprl import objective
from grouprl.envs.config import GRPOConfig
from grouprl.objective import RandomFeatures
from grouprl.rollouts import Rollout

DEFAULT_HORIZON = 1000
"""Steps that scale the time feature where the environment names no time limit."""

EQUAL = 1e-6
"""Relative difference up to which returns summed in float32 count as equal."""


@dataclass
class Baseline:
    """The closed-form group baseline: fixed random features and the weights of the last regression."""

    features: RandomFeatures
    horizon: int
    weights: Tensor | None = None

    def phi(self, inputs: dict[str, Tensor], elapsed: Tensor) -> Tensor:
        """Features ``[m, F]`` of prepared inputs and the steps since the start of the episode ``[m]``."""
        return self.features(summary(inputs), elapsed.float() / self.horizon)


def summary(inputs: dict[str, Tensor]) -> Tensor:
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


def has_signal(rollout: Rollout) -> bool:
    """Whether the rewards could tell one policy from another: they differ, or a non-zero one can end early."""
    rewards = rollout.rewards
    if float(rewards.max() - rewards.min()) > 1e-9:
        return True
    return bool(rollout.terminated.any()) and abs(float(rewards[0])) > 1e-9


def advantages(rollout: Rollout, config: GRPOConfig, baseline: Baseline | None) -> tuple[Tensor, dict[str, float]]:
    """Advantages ``[S]`` on the scale the surrogate sees, and what is worth logging about them.

    ``outcome`` is used as it comes (it is normalised in its group); every other estimator is centred and scaled once
    over the trainable steps of the batch.
    """
    rewards, lengths, group = rollout.rewards, rollout.lengths, rollout.group
    if config.advantage == "baseline":
        assert baseline is not None
        fit = objective.fit_baseline(
            baseline.phi(dict(rollout.inputs), rollout.elapsed),
            baseline.phi(dict(rollout.last_inputs), rollout.last_elapsed),
            rewards,
            lengths,
            rollout.terminated,
            baseline.weights,
            config.gamma,
            config.gae_lambda,
            ridge=config.baseline_ridge,
            sweeps=config.baseline_sweeps,
        )
        baseline.weights = fit.weights
        raw, info = fit.advantages, {"explained_variance": fit.explained_variance}
        lowest, highest = torch.aminmax(fit.values + raw)
        if float(highest - lowest) <= EQUAL * float(torch.maximum(highest.abs(), lowest.abs())):
            # What the ridge leaves over of equal returns is no signal; scaled to unit variance it would pass for one.
            raw = torch.zeros_like(raw)
    elif config.advantage == "tutorial":
        return objective.tutorial(rewards, lengths, config.gamma), {}
    else:
        info = {"degenerate_groups": objective.degenerate_fraction(rewards, lengths, group)}
        if config.advantage == "outcome":
            return objective.outcome(rewards, lengths, group, scale=config.scale_by_std), info
        if config.advantage == "leave_one_out":
            raw = objective.leave_one_out(rewards, lengths, group)
        else:
            raw = objective.timestep(rewards, lengths, group, gamma=config.gamma)
    return objective.standardise(raw, rollout.trainable), info

"""A batch of environment steps, packed: what collection gives and learning takes.

``N`` samples of lengths ``n_1 .. n_N`` are stored end to end, without padding: every per-step quantity is a tensor
``[S, ...]`` with ``S = sum n_i``, every per-sample quantity a tensor ``[N, ...]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """A batch of packed steps. A sample is one contiguous piece of an episode of one environment.

    Attributes:
        observed: the flat observations before normalisation, ``[S, D]``, or None where there are none; last_observed:
            those after the last step of each sample, ``[N, D]``.
        inputs: what the policy sees at each step, each ``[S, ...]``; already normalised.
        last_inputs: what it would see after the last step of each sample, each ``[N, ...]``.
        actions: as sampled, before any clipping to the environment's bounds; ``[S]`` or ``[S, A]``.
        behaviour: parameters of the distribution each action was drawn from, masks applied, ``[S, K]``.
        mask: valid actions ``[S, M]``, or None where the environment names none.
        trainable: ``[S]`` bool; False where the action was not the policy's own (a repeated one): such steps count
            for returns and baseline, never for the policy's loss.
        rewards: ``[S]``.
        elapsed: ``[S]`` steps since the start of the episode; last_elapsed: ``[N]``, after the last step.
        lengths: ``[N]`` int64.
        group: ``[N]`` int64; samples with equal numbers may be compared.
        terminated, truncated: ``[N]`` bool, how the sample ended; neither where the batch cut it.
        episode_returns, episode_lengths: of the episodes completed within this batch, from their true beginning, in the
            order they ended; episode_envs: the environment of each. These returns are of rewards as the environment
            gave them, in float64; learned_returns: of ``rewards``, which are in float32.
    """

    observed: np.ndarray[Any, Any] | None
    inputs: Mapping[str, Tensor]
    last_inputs: Mapping[str, Tensor]
    actions: Tensor
    behaviour: Tensor
    mask: Tensor | None
    trainable: Tensor
    rewards: Tensor
    elapsed: Tensor
    last_elapsed: Tensor
    lengths: Tensor
    group: Tensor
    terminated: Tensor
    truncated: Tensor
    episode_returns: list[float]
    learned_returns: list[float]
    episode_lengths: list[int]
    episode_envs: list[int]
    last_observed: np.ndarray[Any, Any] | None = None

    @property
    def n_steps(self) -> int:
        """S, the number of steps."""
        return int(self.rewards.shape[0])

"""The least memory that an agent and a batch of its take, by the settings that decide it."""

from __future__ import annotations

from itertools import pairwise

from grouprl.envs.config import GRPOConfig

_ENVIRONMENT = 200
"""Bytes of the smallest environment, as one of many in a vector of them."""
_STEP = 20
"""Bytes of a step in a batch, its observation aside: action, log-probability, reward, two flags."""
_WEIGHT = 12
"""Bytes of a weight with its two moments."""


def least_bytes(config: GRPOConfig, inputs: int = 1, observation: int = 1) -> dict[str, float]:
    """What each size asks for at least, of a network with ``inputs`` and of observations of so many bytes each."""
    by_segments = config.collect == "segments"
    steps = config.n_envs * config.n_steps if by_segments else config.min_steps
    batch = f"n_envs={config.n_envs} with n_steps={config.n_steps}" if by_segments else f"min_steps={config.min_steps}"
    widths = (inputs, *config.hidden_sizes, 1)
    needs = {
        f"n_envs={config.n_envs}": config.n_envs * float(_ENVIRONMENT + observation),
        batch: steps * float(_STEP + observation),
        f"hidden_sizes={list(config.hidden_sizes)}": _WEIGHT * sum(float(a) * b for a, b in pairwise(widths)),
    }
    if config.reuse > 1:
        needs[f"{batch} and reuse={config.reuse}"] = config.reuse * needs[batch]
    if config.baseline_memory:
        memory = f"baseline_memory={config.baseline_memory} and baseline_features={config.baseline_features}"
        needs[memory] = 4.0 * config.baseline_features * config.baseline_memory
    if config.advantage == "baseline":
        needs[f"{batch} and baseline_features={config.baseline_features}"] = 4.0 * config.baseline_features * steps
    return needs

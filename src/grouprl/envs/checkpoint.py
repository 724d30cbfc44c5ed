"""Checkpoints a run resumes from bit for bit.

The environments themselves cannot be written without pickling user code. Written instead is the seed they were last
reset from and every action since; reading repeats these. So that the repetition stays short, a checkpoint taken on
schedule begins fresh episodes once the last reset lies more than ``RESTART_AFTER`` time limits back: the run that goes
on and a resumed one then both continue from the same new seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grouprl.envs.collect import HISTORY_LIMIT
from grouprl.envs.estimate import DEFAULT_HORIZON
from grouprl.envs.vector import horizon
from grouprl.errors import UsageError
from grouprl.runs.state import load_state, save_state

if TYPE_CHECKING:
    from grouprl.envs.grpo import GRPO

RESTART_AFTER = 10
"""Time limits after which a scheduled checkpoint starts fresh episodes: cuts few of them, bounds the replay."""


def write(agent: GRPO, path: Path, may_restart: bool, extra: dict[str, Any]) -> None:
    """Write ``agent`` and its environments to ``path``; ``may_restart`` if the checkpoint is on schedule."""
    collector = agent.ready()
    far = collector.steps_since_reset > RESTART_AFTER * (horizon(collector.venv) or DEFAULT_HORIZON)
    if (may_restart and far) or collector.steps_since_reset > HISTORY_LIMIT:
        agent.restart_episodes()
    tensors = {f"policy.{key}": value for key, value in agent.policy.state_dict().items()}
    learner_tensors, learner_values = agent.learner.state()
    collector_arrays, collector_values = collector.state()
    tensors |= learner_tensors
    tensors |= {f"collector.{key}": torch.from_numpy(value) for key, value in collector_arrays.items()}
    if agent.baseline is not None and agent.baseline.weights is not None:
        tensors["baseline.weights"] = agent.baseline.weights
    state = {
        "learner": learner_values,
        "collector": collector_values,
        "rng": {name: rng.bit_generator.state for name, rng in agent.streams().items()},
        "sticky": agent.sticky.state(),
        "counters": agent.counters(),
        "extra": extra,
    }
    save_state(path, tensors, {**agent.describe("checkpoint"), "state": state})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write` wrote to ``path``: tensors, and the description with its ``state``.

    Raises:
        UsageError: not a checkpoint, or a corrupt one.
    """
    tensors, meta = load_state(path)
    if meta.get("kind") != "checkpoint":
        raise UsageError(f"{path} is a saved model, not a checkpoint; GRPO.load reads it")
    return tensors, meta


def restore(agent: GRPO, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put ``agent``, which has the policy and the environments of the checkpoint, where it was."""
    agent.learner.load(tensors, state["learner"])
    if agent.baseline is not None and "baseline.weights" in tensors:
        agent.baseline.weights = tensors["baseline.weights"]
    for name, rng in agent.streams().items():
        rng.bit_generator.state = state["rng"][name]
    agent.sticky.load(state["sticky"])
    agent.restore_counters(state["counters"])
    agent.extra = state["extra"]
    prefix = "collector."
    arrays = {key.removeprefix(prefix): value.numpy() for key, value in tensors.items() if key.startswith(prefix)}
    agent.ready().load(arrays, state["collector"])

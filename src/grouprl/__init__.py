"""Critic-free reinforcement learning: GRPO for Gymnasium environments, and for language models in :mod:`grouprl.lm`.

    from grouprl import GRPO
    agent = GRPO("CartPole-v1").learn(100_000)

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # checkers take it for typing's, whose import would be a third of the start of a command
if TYPE_CHECKING:
    from typing import Any

    from grouprl.envs.config import GRPOConfig
    from grouprl.envs.evaluation import evaluate
    from grouprl.envs.grpo import GRPO
    from grouprl.errors import GrouprlError, TrainingError, UsageError

__version__ = "0.1.0"

_HOMES = {
    "GRPO": "grouprl.envs.grpo",
    "GRPOConfig": "grouprl.envs.config",
    "evaluate": "grouprl.envs.evaluation",
    "GrouprlError": "grouprl.errors",
    "TrainingError": "grouprl.errors",
    "UsageError": "grouprl.errors",
}
__all__ = ["GRPO", "GRPOConfig", "GrouprlError", "TrainingError", "UsageError", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grouprl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

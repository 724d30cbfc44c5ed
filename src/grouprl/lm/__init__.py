"""GRPO for language models, in the shape of TRL.

    from grouprl.lm import GRPOConfig, GRPOTrainer
    GRPOTrainer(model="...", reward_funcs=reward, train_dataset=data, args=GRPOConfig()).train()

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grouprl.extras import require

if TYPE_CHECKING:
    from grouprl.lm.agents.environments.text import text_environment
    from grouprl.lm.settings.config import GRPOConfig
    from grouprl.lm.settings.parser import TrlParser
    from grouprl.lm.train.trainer import GRPOTrainer

_HOMES = {
    "GRPOConfig": "grouprl.lm.settings.config",
    "GRPOTrainer": "grouprl.lm.train.trainer",
    "TrlParser": "grouprl.lm.settings.parser",
    "text_environment": "grouprl.lm.agents.environments.text",
}
__all__ = ["GRPOConfig", "GRPOTrainer", "TrlParser", "text_environment"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grouprl.lm' has no attribute {name!r}")
    if name in ("GRPOTrainer", "TrlParser"):
        require("transformers")
    return getattr(import_module(_HOMES[name]), name)

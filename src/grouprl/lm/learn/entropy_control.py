"""Adaptive entropy control: an entropy bonus that acts only while the entropy is low, and grows as long as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grouprl.lm.settings.config import GRPOConfig


@dataclass
class EntropyControl:
    """The weight of the entropy bonus, step by step.

    After each optimizer step the weight rises by ``entropy_coef_delta`` if the mean entropy of the tokens that were
    learned from is at most ``entropy_target``, and else falls by as much, within its bounds. It is applied to the next
    step if that entropy was at most the target. The first step has no bonus, as nothing is known of its entropy yet.

    Source: Skywork-OR1, arXiv 2505.22312; bounds, and the target included, as in TRL.

    Attributes:
        weight: as it stands. last: the mean entropy in the last step, in nats; infinite before the first.
    """

    config: GRPOConfig
    weight: float
    last: float = math.inf

    @classmethod
    def of(cls, config: GRPOConfig) -> EntropyControl | None:
        """As the settings say, or None if the weight is constant."""
        return cls(config, config.entropy_coef) if config.use_adaptive_entropy else None

    @property
    def applied(self) -> float:
        """The weight of the bonus in the next step."""
        return self.weight if self.last <= self.config.entropy_target else 0.0

    def note(self, entropy: float) -> None:
        """The mean entropy of the tokens of a step, in nats."""
        config, self.last = self.config, entropy
        if entropy <= config.entropy_target:
            self.weight = min(self.weight + config.entropy_coef_delta, config.entropy_coef_max)
        else:
            self.weight = max(self.weight - config.entropy_coef_delta, config.entropy_coef_min)

    def state(self) -> dict[str, float | None]:
        """For a checkpoint."""
        return {"weight": self.weight, "last": None if math.isinf(self.last) else self.last}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        last = state["last"]
        self.weight, self.last = float(state["weight"]), math.inf if last is None else float(last)

"""Exploration by repeating actions: in some of the environments, for part of the run, as long as it helps."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from grouprl.envs.rollout import Rollout

SHARE_OF_ENVIRONMENTS = 0.5
"""Half of the environments repeat actions, so that there is always something to compare them with."""
FADED_AT = 0.5
"""Fraction of the budget after which repeating has faded to nothing."""
SWITCH_OFF_BELOW = 0.05
"""Scale at which the next failure switches repetition off for good."""


def sticky_envs(n: int) -> npt.NDArray[np.bool_]:
    """``[n]``: the environments that repeat actions, the last half of them."""
    return np.arange(n) >= n * (1 - SHARE_OF_ENVIRONMENTS) - 1e-9


class StickyActions:
    """The probability with which an environment repeats its last action.

    It fades with the part of the budget that carried a signal, so that it stays where nothing was found yet, and is
    quartered whenever the episodes that repeat return less than those that do not.

    Args:
        initial: the probability at the start, in [0, 1).
    """

    def __init__(self, initial: float) -> None:
        self.initial = initial
        self.scale = 1.0
        self._returns: tuple[list[float], list[float]] = ([], [])  # of the environments that do not and that do repeat

    def probability(self, used: float) -> float:
        """The probability after the fraction ``used`` of the budget."""
        return self.initial * max(0.0, 1.0 - used / FADED_AT) * self.scale

    def judge(self, rollout: Rollout, repeats: npt.NDArray[np.bool_]) -> None:
        """Compare the episodes of environments that do and do not repeat, once there are a few of each.

        Args:
            rollout: the newest batch.
            repeats: ``[n]``, the environments that repeat actions.
        """
        for env, value in zip(rollout.episode_envs, rollout.learned_returns, strict=True):
            self._returns[int(repeats[env])].append(value)
        plain, sticky = self._returns
        if min(len(plain), len(sticky)) >= max(1, len(repeats) // 4):
            if np.mean(sticky) < np.mean(plain) - 1e-6:
                self.scale = self.scale / 4 if self.scale > SWITCH_OFF_BELOW else 0.0
            self._returns = ([], [])

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"scale": self.scale, "returns": self._returns}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.scale = state["scale"]
        self._returns = (list(state["returns"][0]), list(state["returns"][1]))

"""Numbers of an observation that are told apart only before they become float32."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from grouprl.envs.spaces import ObservationCodec

Doubles = npt.NDArray[np.float64]

LARGEST_ERROR = 0.1
"""Deviations by which float32 may miss a normalised number, in the root mean square."""

WHOLE_BELOW = 2.0**24
"""Whole numbers below are exact in float32. Larger numbers may have been rounded before they came here."""

LEAST_VARIANCE = 1e-8
"""What the normalisation adds to every variance."""


class Rounding:
    """What float32 leaves of the observations of a warm-up, number by number.

    Args:
        observations: says which numbers are normalised, and what they are called.
    """

    def __init__(self, observations: ObservationCodec) -> None:
        self.observations = observations
        self._rows = 0
        self._origin: Doubles | None = None  # of the sums, which would cancel far from it
        self._largest, self._sum, self._squares, self._errors = np.zeros((4, observations.n_flat))

    @np.errstate(all="ignore")  # what is not finite is an error elsewhere
    def add(self, numbers: Doubles) -> None:
        """See ``m`` more observations, ``[m, D]`` as :meth:`ObservationCodec.numbers` gives them."""
        if not len(numbers):
            return
        if self._origin is None:
            self._origin = numbers[0].copy()
        moved = numbers - self._origin
        self._rows += len(numbers)
        self._sum += moved.sum(0)
        self._squares += (moved**2).sum(0)
        self._errors += ((numbers - numbers.astype(np.float32)) ** 2).sum(0)
        np.maximum(self._largest, np.abs(numbers).max(0), out=self._largest)

    @np.errstate(all="ignore")
    def warn(self) -> None:
        """Warn of numbers that change by no more than float32 leaves out of them, if there are any."""
        rows = max(1, self._rows)
        variance = np.maximum(0.0, self._squares / rows - (self._sum / rows) ** 2)
        step = np.spacing(self._largest.astype(np.float32)).astype(np.float64)
        rounded_before = np.where((self._largest >= WHOLE_BELOW) & (variance > 0), step**2 / 12, 0.0)
        error = np.maximum(self._errors / rows, rounded_before)
        lost = self.observations.normalise & (error > LARGEST_ERROR**2 * (variance + LEAST_VARIANCE)) & (variance > 0)
        if not lost.any():
            return
        worst = int(np.argmax(np.where(lost, error / (variance + LEAST_VARIANCE), -1.0)))
        others = int(lost.sum()) - 1
        warnings.warn(
            f"{self.observations.name_of('flat', worst)} of the observation is up to {self._largest[worst]:.3g} and "
            f"changes by about {np.sqrt(variance[worst]):.2g}, and observations become float32 before they are "
            f"normalised, which there tells apart only what differs by {step[worst]:.2g}: most of its changes are lost"
            f"{f' ({others} more of its numbers have the same fault)' if others else ''}. Subtract the offset in the "
            "environment, in float64, or in gymnasium.wrappers.TransformObservation around it",
            stacklevel=2,
        )

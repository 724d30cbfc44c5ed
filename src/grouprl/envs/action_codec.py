"""An action space at the end of a policy: sampled actions become what ``env.step`` gets."""

import warnings
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from grouprl.envs.distributions import (
    Categorical,
    DiagonalGaussian,
    Distribution,
    IndependentBernoulli,
    MultiCategorical,
)
from grouprl.errors import UsageError

Array: TypeAlias = npt.NDArray[Any]
Space: TypeAlias = spaces.Space[Any]

_WIDEST_RANGE = 1e6


class ActionCodec:
    """The action distribution of an action space, and the way from its samples to what ``env.step`` gets.

    It is built from the space of a *single* environment and makes batches as vector environments take them.

    Discrete, MultiDiscrete (any start and shape), MultiBinary, and Box of floats (any shape; finite, infinite or mixed
    bounds). Any other space raises UsageError.

    A Box component with two bounds is sampled in a unit in which they are -1 and 1; any other in its own unit, around
    the value nearest to 0. Bounds further apart than ``_WIDEST_RANGE`` count as none, which a UserWarning says: nobody
    acts on such a scale. Samples are unbounded: log-probabilities are those of the sample, only the environment gets it
    clipped.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.distribution: Distribution = _distribution(space)
        if isinstance(space, spaces.Box):
            compute = np.result_type(np.float32, space.dtype)
            largest = np.finfo(space.dtype).max  # where there is no bound: what is cast to infinity is no action
            low = np.maximum(space.low.ravel(), -largest).astype(compute)
            high = np.minimum(space.high.ravel(), largest).astype(compute)
            half_range = high / 2 - low / 2
            bounded = np.isfinite(space.low).ravel() & np.isfinite(space.high).ravel()
            bounded &= half_range < _WIDEST_RANGE / 2
            _warn_of_wide_bounds(space, ~bounded)
            self._low, self._high = low, high
            self._middle = np.where(bounded, low / 2 + high / 2, np.clip(0, low, high)).astype(compute)
            self._half_range = np.where(bounded, half_range, 1).astype(compute)

    def affine(self) -> tuple[Array, Array, Array, Array]:
        """Of a Box, flattened: low, high, middle and half range, as :meth:`to_env` uses them, each ``[A]``."""
        return self._low, self._high, self._middle, self._half_range

    @property
    def mask_size(self) -> int:
        """Entries of one action mask; 0 if this space takes none."""
        distribution = self.distribution
        return distribution.n_params if isinstance(distribution, Categorical | MultiCategorical) else 0

    def to_env(self, actions: Array) -> Array:
        """Sampled actions [n, ...] as a batch for ``env.step``, always inside the action space and of its dtype.

        Discrete: plus start. Box: middle + half_range * clip(a, -1, 1) where there are two bounds, else middle + a,
        clipped to the finite bound, if any. MultiDiscrete and MultiBinary: plus start, in the space's shape.

        It is memory of its own, so that an environment may change it in place.
        """
        space = self.space
        if isinstance(space, spaces.Discrete):
            return (actions + np.int64(space.start)).astype(space.dtype, copy=False)
        shaped: Array = actions.reshape(len(actions), *(space.shape or ()))
        if isinstance(space, spaces.Box):
            # Clipping after the affine map equals clipping to [-1, 1] before it, and holds against rounding.
            with np.errstate(all="ignore"):
                scaled: Array = np.multiply(actions, self._half_range, dtype=self._low.dtype)
                scaled += self._middle
            np.maximum(scaled, self._low, out=scaled)
            np.minimum(scaled, self._high, out=scaled)
            return scaled.astype(space.dtype, copy=False).reshape(shaped.shape)
        shaped = shaped.astype(space.dtype)
        if isinstance(space, spaces.MultiDiscrete):
            shaped += space.start
        return shaped


def _warn_of_wide_bounds(space: spaces.Box, unbounded: npt.NDArray[np.bool_]) -> None:
    """Warn where both bounds are finite and ``unbounded [A]``."""
    named = np.flatnonzero(unbounded & np.isfinite(space.low).ravel() & np.isfinite(space.high).ravel())
    if named.size:
        i = named[0]
        warnings.warn(
            f"component {i} of the action space has the bounds {space.low.flat[i]:g} and {space.high.flat[i]:g}, which "
            "are so far apart that they count as none: actions begin around 0 with a spread of about 1. If the "
            "environment needs others, give it bounds of the size of its actions, or wrap it in "
            "gymnasium.wrappers.RescaleAction",
            UserWarning,
            stacklevel=5,
        )


def _distribution(space: Space) -> Distribution:
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n))
    size = prod(space.shape or ())
    if isinstance(space, spaces.MultiDiscrete) and size:
        return MultiCategorical(tuple(space.nvec.ravel().tolist()))
    if isinstance(space, spaces.MultiBinary) and size:
        return IndependentBernoulli(size)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating) and size:
        return DiagonalGaussian(size)
    fix = (
        "Declare integer actions as MultiDiscrete"
        if isinstance(space, spaces.Box) and size
        else "Wrap the environment in gymnasium.wrappers.TransformAction with a function from one of these spaces"
    )
    raise UsageError(
        f"The action space is {space}. Allowed are Discrete, MultiDiscrete, MultiBinary and Box of floats, with at "
        f"least one component. {fix}."
    )

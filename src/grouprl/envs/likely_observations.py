"""Observations like those of training, drawn without an environment: numbers as they were spread, others evenly."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.distributions import Categorical, MultiCategorical
from grouprl.envs.policy import Policy

Array = npt.NDArray[Any]


def draw_observations(policy: Policy, codec: ActionCodec, n: int, seed: int = 0) -> list[Array]:
    """One array ``[n, ...]`` for each leaf of the observation space, of its type and within its bounds.

    Args:
        policy: has the mean and the spread of what it was trained on, where it normalises.
        codec: of the action space; a mask among the leaves leaves an action in every row.
    """
    rng, observations = np.random.default_rng(seed), policy.observations
    starts: dict[int, int] = {}
    column = 0
    for place, one_hots in observations.flat_leaves:
        starts[place] = column
        column += sum(one_hots[1]) if one_hots else prod(observations.leaves[place][1].shape or ())
    mean, deviation = policy.mean.cpu().numpy(), np.sqrt(policy.variance.cpu().numpy())
    arrays: list[Array] = []
    array: Array
    for place, (_, space) in enumerate(observations.leaves):
        shape = (n, *(space.shape or ()))
        if place == observations.mask_place:
            array = draw_masks(codec, n, seed).reshape(shape)
        elif isinstance(space, spaces.Box) and place in starts:
            columns = slice(starts[place], starts[place] + prod(space.shape))
            numbers = mean[columns] + deviation[columns] * rng.standard_normal((n, prod(space.shape)))
            if np.issubdtype(space.dtype, np.integer):
                numbers = np.rint(numbers)
            array = np.clip(numbers.reshape(shape), space.low, space.high)
        elif isinstance(space, spaces.Box):
            array = rng.integers(0, 256, shape)
        elif isinstance(space, spaces.MultiBinary):
            array = rng.integers(0, 2, shape)
        else:
            assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
            sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
            array = space.start + rng.integers(0, sizes, shape)
        arrays.append(np.ascontiguousarray(array, dtype=space.dtype))
    return arrays


def draw_masks(codec: ActionCodec, n: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Masks ``[n, K]`` that allow about half of the actions, and one of each component at least."""
    rng, distribution = np.random.default_rng(seed + 1), codec.distribution
    assert isinstance(distribution, Categorical | MultiCategorical)
    sizes = np.array(distribution.nvec if isinstance(distribution, MultiCategorical) else [distribution.n])
    masks = rng.random((n, int(sizes.sum()))) < 0.5
    first = np.cumsum(sizes) - sizes
    np.put_along_axis(masks, first + rng.integers(0, sizes, (n, len(sizes))), True, axis=1)
    return masks


def assembled(space: spaces.Space[Any], arrays: list[Array]) -> Any:
    """The arrays of :func:`draw_observations` as a batch of observations in Gymnasium's layout."""
    rest = iter(arrays)

    def part(of: spaces.Space[Any]) -> Any:
        if isinstance(of, spaces.Dict):
            return {key: part(inner) for key, inner in of.spaces.items()}
        if isinstance(of, spaces.Tuple):
            return tuple(part(inner) for inner in of.spaces)
        return next(rest)

    return part(space)

"""The leaves of an observation space: which there are, and how the values of each become numbers or an image."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from grouprl.errors import UsageError

Array: TypeAlias = npt.NDArray[Any]
Space: TypeAlias = spaces.Space[Any]
Path: TypeAlias = tuple[Any, ...]
Layout: TypeAlias = Literal["HW", "HWC", "CHW", "FHWC", "FCHW"]
"""The axes of an image: frames, height, width, channels."""

_MIN_IMAGE_SIDE = 16
_MAX_IMAGE_CHANNELS = 16


def leaf_name(path: Path) -> str:
    """A path as one string, escaped as a JSON pointer (RFC 6901): different paths get different names."""
    return "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in path)


def image_layout(space: Space) -> Layout | None:
    """How a Box holds an image, or None if it is no image.

    An image is uint8 with bounds 0 and 255 throughout, [H, W] or with one channel axis, first or last: the smaller of
    the two, last if they are equal (as Gymnasium renders), of at most 16 channels; H and W are at least 16. A stack of
    frames (4, 84, 84) is CHW. An axis of at most 16 frames may precede the axes of an image with channels.
    """
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return None
    if (space.low != 0).any() or (space.high != 255).any():
        return None
    if len(space.shape) == 4:
        layout = _layout_of_shape(space.shape[1:])
        if layout is None or not 1 <= space.shape[0] <= _MAX_IMAGE_CHANNELS:
            return None
        return "FHWC" if layout == "HWC" else "FCHW"
    return _layout_of_shape(space.shape)


def _layout_of_shape(shape: tuple[int, ...]) -> Literal["HW", "HWC", "CHW"] | None:
    """How these axes hold one image, or None if they hold none."""
    if len(shape) not in (2, 3):
        return None
    layout: Literal["HW", "HWC", "CHW"]
    sides: tuple[int, ...]
    if len(shape) == 2:
        layout, channels, sides = "HW", 1, shape
    elif shape[0] < shape[2]:
        layout, channels, sides = "CHW", shape[0], shape[1:]
    else:
        layout, channels, sides = "HWC", shape[2], shape[:2]
    return layout if 1 <= channels <= _MAX_IMAGE_CHANNELS and min(sides) >= _MIN_IMAGE_SIDE else None


def leaves_of(space: Space, path: Path = ()) -> Iterator[tuple[Path, Space]]:
    """The leaves of a nested space with their paths; UsageError for a leaf without a fixed array form."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from leaves_of(part, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from leaves_of(part, (*path, index))
    elif isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        yield path, space
    else:
        fix = "gymnasium.wrappers.TransformObservation with a function to one of these spaces"
        if _flattens(space):
            fix = f"gymnasium.wrappers.FlattenObservation, or in {fix}"
        elif path:
            fix = f"gymnasium.wrappers.FilterObservation to leave it out, or in {fix}"
        where = f"leaf {leaf_name(path)!r} of the observation space" if path else "observation space"
        raise UsageError(
            f"The {where} is {type(space).__name__}: {space}. Allowed are Box, Discrete, MultiDiscrete, MultiBinary, "
            f"and Dict or Tuple of these. Wrap the environment in {fix}."
        )


def _flattens(space: Space) -> bool:
    """Whether Gymnasium can flatten the space; a space of someone else's need not say."""
    try:
        return space.is_np_flattenable
    except NotImplementedError:
        return False


def take(observation: Any, path: Path) -> Any:
    """What a nested observation holds at a path."""
    for key in path:
        observation = observation[key]
    return observation


@dataclass(frozen=True)
class Numbers:
    """A flat leaf copied into columns [start, stop)."""

    path: Path
    shape: tuple[int, ...]
    start: int
    stop: int

    def write(self, flat: Array, values: Array) -> None:
        """Copy ``values [n, *shape]`` into their columns of ``flat [n, D]``."""
        flat[:, self.start : self.stop] = values.reshape(len(values), self.stop - self.start)


@dataclass(frozen=True, eq=False)
class OneHots:
    """A leaf of integers; component i sets one of the ``sizes[i]`` columns from ``columns[i]``."""

    path: Path
    shape: tuple[int, ...]
    lowest: Array
    sizes: Array
    columns: Array

    def write(self, flat: Array, values: Array) -> None:
        """Set ones in the columns of ``flat [n, D]`` that ``values [n, *shape]`` name; those columns hold zeros.

        Raises UsageError for a value outside its space.
        """
        index = values.reshape(len(values), len(self.sizes)).astype(np.int64)
        index -= self.lowest
        # As unsigned numbers negative ones are huge: one comparison finds both, and none spills into another leaf.
        if (index.view(np.uint64) >= self.sizes).any():
            raise UsageError(
                f"An observation{f' at {leaf_name(self.path)!r}' if self.path else ''} lies outside its space: allowed "
                f"are {self.lowest.tolist()} to {(self.lowest + self.sizes.astype(np.int64) - 1).tolist()}, given were "
                f"{values.min()} to {values.max()}. Correct the environment's observation or its observation_space."
            )
        index += self.columns
        flat[np.arange(len(flat))[:, None], index] = 1.0


@dataclass(frozen=True)
class Image:
    """A leaf that stays an image of its own."""

    path: Path
    shape: tuple[int, ...]
    layout: Layout

    def channels_first(self, values: Array) -> Array:
        """``values [n, *shape]`` as ``[n, C, H, W]``, a view where that is possible."""
        if self.layout == "FHWC":
            values = values.transpose(0, 1, 4, 2, 3)
        if self.layout in ("FHWC", "FCHW"):  # the channels of the newest frame are the last ones
            return values.reshape(len(values), -1, *values.shape[3:])
        if self.layout == "HWC":
            return values.transpose(0, 3, 1, 2)
        return values[:, None] if self.layout == "HW" else values

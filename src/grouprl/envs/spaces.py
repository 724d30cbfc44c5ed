"""An observation space at the beginning of a policy: observations become arrays.

The codec is built from the space of a *single* environment and works on batches as vector environments give them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from grouprl.envs.masks import many_masks
from grouprl.errors import UsageError, error_text

Array: TypeAlias = npt.NDArray[Any]
Space: TypeAlias = spaces.Space[Any]
Path: TypeAlias = tuple[Any, ...]
Layout: TypeAlias = Literal["HW", "HWC", "CHW", "FHWC", "FCHW"]
"""The axes of an image: frames, height, width, channels."""

_MASK = "action_mask"
"""What a Dict calls the action mask."""
_MIN_IMAGE_SIDE = 16
_MAX_IMAGE_CHANNELS = 16


def _name(path: Path) -> str:
    """A path as one string, escaped as a JSON pointer (RFC 6901): different paths get different names."""
    return "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in path)


def _image_layout(space: Space) -> Layout | None:
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


def _leaves(space: Space, path: Path = ()) -> Iterator[tuple[Path, Space]]:
    """The leaves of a nested space with their paths; UsageError for a leaf without a fixed array form."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from _leaves(part, (*path, index))
    elif isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        yield path, space
    else:
        fix = "gymnasium.wrappers.TransformObservation with a function to one of these spaces"
        if _flattens(space):
            fix = f"gymnasium.wrappers.FlattenObservation, or in {fix}"
        elif path:
            fix = f"gymnasium.wrappers.FilterObservation to leave it out, or in {fix}"
        where = f"leaf {_name(path)!r} of the observation space" if path else "observation space"
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


def _take(observation: Any, path: Path) -> Any:
    for key in path:
        observation = observation[key]
    return observation


@dataclass(frozen=True)
class _Numbers:
    """A flat leaf copied into columns [start, stop)."""

    path: Path
    shape: tuple[int, ...]
    start: int
    stop: int

    def write(self, flat: Array, values: Array) -> None:
        flat[:, self.start : self.stop] = values.reshape(len(values), self.stop - self.start)


@dataclass(frozen=True, eq=False)
class _OneHots:
    """A leaf of integers; component i sets one of the ``sizes[i]`` columns from ``columns[i]``."""

    path: Path
    shape: tuple[int, ...]
    lowest: Array
    sizes: Array
    columns: Array

    def write(self, flat: Array, values: Array) -> None:
        index = values.reshape(len(values), len(self.sizes)).astype(np.int64)
        index -= self.lowest
        # As unsigned numbers negative ones are huge: one comparison finds both, and none spills into another leaf.
        if (index.view(np.uint64) >= self.sizes).any():
            raise UsageError(
                f"An observation{f' at {_name(self.path)!r}' if self.path else ''} lies outside its space: allowed are "
                f"{self.lowest.tolist()} to {(self.lowest + self.sizes.astype(np.int64) - 1).tolist()}, given were "
                f"{values.min()} to {values.max()}. Correct the environment's observation or its observation_space."
            )
        index += self.columns
        flat[np.arange(len(flat))[:, None], index] = 1.0


@dataclass(frozen=True)
class _Image:
    path: Path
    shape: tuple[int, ...]
    layout: Layout

    def channels_first(self, values: Array) -> Array:
        if self.layout == "FHWC":
            values = values.transpose(0, 1, 4, 2, 3)
        if self.layout in ("FHWC", "FCHW"):  # the channels of the newest frame are the last ones
            return values.reshape(len(values), -1, *values.shape[3:])
        if self.layout == "HWC":
            return values.transpose(0, 3, 1, 2)
        return values[:, None] if self.layout == "HW" else values


class ObservationCodec:
    """Turns batched observations into the arrays a policy reads.

    Box (any shape and number dtype), Discrete and MultiDiscrete (one-hot, any start), MultiBinary, and Dict or Tuple of
    these, nested. All but images are concatenated into "flat" float32 [n, D]; each image (see ``_image_layout``: uint8
    from 0 to 255, of at least 16 x 16) stays apart as "image:<path>" [n, C, H, W] in its own dtype.

    A leaf "action_mask" of a Dict, of zeros and ones, is the action mask and no input. ``mask_size`` is the size the
    action space needs: 0 means that it takes no masks; None accepts any size.

    Raises UsageError for an unsupported leaf, a leaf "action_mask" that cannot be one, or a space without
    any input.
    """

    def __init__(self, space: Space, mask_size: int | None = None) -> None:
        self.space = space
        self._mask_path, self._mask_size = _mask_leaf(space, mask_size)
        self._flat: list[_Numbers | _OneHots] = []
        self._images: dict[str, _Image] = {}
        self._image_shapes: dict[str, tuple[int, int, int]] = {}
        self._shapes: list[tuple[Path, tuple[int, ...]]] = []
        self._leaf_spaces: list[Space] = []
        normalise: list[npt.NDArray[np.bool_]] = []
        scale: list[Array] = []
        n_flat = 0
        for path, leaf in _leaves(space):
            shape = tuple(leaf.shape or ())
            self._shapes.append((path, shape))
            self._leaf_spaces.append(leaf)
            layout = _image_layout(leaf)
            if path == self._mask_path:
                continue
            if layout is not None:
                key = f"image:{_name(path)}"
                self._images[key] = _Image(path, shape, layout)
                _, channels, height, width = self._images[key].channels_first(np.empty((1, *shape), np.uint8)).shape
                self._image_shapes[key] = (channels, height, width)
                continue
            if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete):
                sizes = np.atleast_1d(leaf.n if isinstance(leaf, spaces.Discrete) else leaf.nvec).ravel()
                columns = n_flat + np.cumsum(sizes, dtype=np.int64) - sizes
                lowest = np.broadcast_to(leaf.start, shape).ravel().astype(np.int64)
                self._flat.append(_OneHots(path, shape, lowest, sizes.astype(np.uint64), columns.astype(np.int64)))
                width = int(sizes.sum())
                scale.append(np.repeat(np.sqrt(sizes), sizes).astype(np.float32))
            else:
                width = prod(shape)
                self._flat.append(_Numbers(path, shape, n_flat, n_flat + width))
                scale.append(np.ones(width, np.float32))
            normalise.append(np.full(width, isinstance(leaf, spaces.Box)))
            n_flat += width
        self._n_flat = n_flat
        self._normalise = np.concatenate(normalise) if normalise else np.zeros(0, dtype=np.bool_)
        self._scale = np.concatenate(scale) if scale else np.zeros(0, dtype=np.float32)
        if n_flat == 0 and not self._images:
            raise UsageError(
                f"The observation space {space} holds no number to learn from; allowed is a space with at least one. "
                "Give the environment an observation, for instance a constant Box of shape (1,)."
            )

    @property
    def n_flat(self) -> int:
        """Width D of "flat"; 0 if there is none."""
        return self._n_flat

    @property
    def images(self) -> dict[str, tuple[int, int, int]]:
        """Shape (C, H, W) of each image, by its key."""
        return self._image_shapes

    @property
    def normalise(self) -> npt.NDArray[np.bool_]:
        """[D], True where a flat component is real-valued (from a Box) and may be normalised."""
        return self._normalise

    @property
    def scale(self) -> Array:
        """[D], what gives a component unit root mean square: sqrt(n) in a one-hot of n equally likely values."""
        return self._scale

    @property
    def leaf_names(self) -> list[str]:
        """Where each array of an observation stands, in the order of the space; one empty name if it is no Dict."""
        return [_name(path) for path, _ in self._shapes]

    @property
    def leaves(self) -> list[tuple[str, Space]]:
        """The name and the space of each leaf, in the order of :attr:`leaf_names`."""
        return list(zip(self.leaf_names, self._leaf_spaces, strict=True))

    @property
    def mask_place(self) -> int:
        """Which of the leaves is the mask of actions; -1 if none is."""
        return -1 if self._mask_path is None else self._place(self._mask_path)

    @property
    def flat_leaves(self) -> list[tuple[int, tuple[list[int], list[int]] | None]]:
        """The leaves that "flat" holds side by side: number of the leaf; lowest values and sizes of its one-hots, or
        None for numbers.
        """
        return [
            (
                self._place(leaf.path),
                None if isinstance(leaf, _Numbers) else (leaf.lowest.tolist(), [int(size) for size in leaf.sizes]),
            )
            for leaf in self._flat
        ]

    @property
    def image_leaves(self) -> list[tuple[int, str]]:
        """The leaves that are images, in the order of :attr:`images`: number of the leaf, and its axes in letters."""
        return [(self._place(image.path), image.layout) for image in self._images.values()]

    def _place(self, path: Path) -> int:
        return next(i for i, (other, _) in enumerate(self._shapes) if other == path)

    def name_of(self, key: str, component: int) -> str:
        """Where a number of what :meth:`encode` gives comes from, in words.

        Args:
            key: of the array. component: place of the number in its row, flattened.
        """
        if key != "flat":
            return f"observation {key.removeprefix('image:')!r}" if key != "image:" else "the image"
        for leaf in self._flat:
            width = leaf.stop - leaf.start if isinstance(leaf, _Numbers) else int(leaf.sizes.sum())
            if component < width:
                where = f"component {component}"
                return f"{where} of {_name(leaf.path)!r}" if leaf.path else where
            component -= width
        return f"component {component}"

    @np.errstate(all="ignore")  # what is too large becomes infinite, which is looked for
    def encode(self, observations: Any) -> dict[str, Array]:
        """The arrays of n observations in Gymnasium's batched layout (dicts and tuples of arrays [n, ...]).

        A single flat float32 Box and images come back as views of what was given: copy what is kept.
        Values are not checked for NaN. Raises UsageError for a Discrete value outside its space.
        """
        encoded: dict[str, Array] = {}
        if len(self._flat) == 1 and isinstance(self._flat[0], _Numbers):
            values = np.asarray(_take(observations, self._flat[0].path), dtype=np.float32)
            if values.ndim != 2:
                values = values.reshape(len(values), self._n_flat)
            encoded["flat"] = values
        elif self._n_flat:
            arrays = [np.asarray(_take(observations, leaf.path)) for leaf in self._flat]
            flat = np.zeros((len(arrays[0]), self._n_flat), dtype=np.float32)
            for leaf, array in zip(self._flat, arrays, strict=True):
                leaf.write(flat, array)
            encoded["flat"] = flat
        for key, image in self._images.items():
            encoded[key] = image.channels_first(np.asarray(_take(observations, image.path)))
        return encoded

    def numbers(self, observations: Any) -> npt.NDArray[np.float64]:
        """ "flat" before it becomes float32, [n, D]; 0 in one-hots. The observations are as in :meth:`encode`."""
        arrays = [np.asarray(_take(observations, leaf.path)) for leaf in self._flat]
        flat = np.zeros((len(arrays[0]) if arrays else 0, self._n_flat))
        for leaf, array in zip(self._flat, arrays, strict=True):
            if isinstance(leaf, _Numbers):
                leaf.write(flat, array)
        return flat

    def encode_single(self, observation: Any) -> dict[str, Array]:
        """The arrays, with n = 1, of one observation of a single environment."""
        return self.encode(self.batch_of_one(observation))

    def batch_of_one(self, observation: Any) -> Any:
        """One observation with a batch axis of 1 on every leaf."""
        return _with_batch_axis(self.space, observation)

    def mask(self, observations: Any) -> npt.NDArray[np.bool_] | None:
        """The action mask [n, actions] of n observations, True where allowed; None if the space has none."""
        if self._mask_path is None:
            return None
        values = np.asarray(_take(observations, self._mask_path))
        return many_masks(values, len(values), self._mask_size)

    def is_batched(self, observation: Any) -> bool:
        """Whether this is a batch [n, ...] (True) or one observation (False); UsageError if it is neither."""
        try:
            given = {path: np.shape(_take(observation, path)) for path, _ in self._shapes}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UsageError(
                f"The observation given ({type(observation).__name__}) is not laid out as its space {self.space}: "
                f"{error_text(error)}. Give one observation of that space or a batch of them "
                "(a dict or tuple of arrays [n, ...])."
            ) from error
        if all(given[path] == shape for path, shape in self._shapes):
            return False
        batched = all(len(given[path]) == len(shape) + 1 and given[path][1:] == shape for path, shape in self._shapes)
        if batched and len({shape[0] for shape in given.values()}) == 1:
            return True
        shown = ", ".join(f"{_name(path)!r} " * bool(path) + str(shape) for path, shape in given.items())
        wanted = ", ".join(f"{_name(path)!r} " * bool(path) + str(shape) for path, shape in self._shapes)
        raise UsageError(
            f"The observation given has shapes {shown}; allowed are {wanted} for one observation, or the same with one "
            "leading batch axis of equal length everywhere. Reshape it to either."
        )


def _mask_leaf(space: Space, size: int | None) -> tuple[Path | None, int]:
    """Where the action mask stands in the space, and its size; None and 0 if there is none."""
    found = list(_named(space, _MASK))
    if not found:
        return None, 0
    path, leaf = found[0]
    name = _name(path)
    if len(found) > 1:
        raise UsageError(
            f"The observation space has {len(found)} leaves {_MASK!r}: "
            f"{', '.join(_name(where) for where, _ in found)}; allowed is one, the mask of the actions. Rename the "
            "others."
        )
    shape = tuple(leaf.shape or ())
    zeros_and_ones = (
        isinstance(leaf, spaces.MultiBinary)
        or (isinstance(leaf, spaces.Box) and bool((leaf.low >= 0).all() and (leaf.high <= 1).all()))
        or (isinstance(leaf, spaces.MultiDiscrete) and bool((leaf.nvec == 2).all() and (leaf.start == 0).all()))
    )
    if size == 0:
        problem = "is no mask, because the action space takes none; allowed are Discrete and MultiDiscrete actions"
    elif not zeros_and_ones:
        problem = f"is {leaf}, which holds more than 0 and 1; allowed is MultiBinary({size or 'n'})"
    elif size is not None and prod(shape) != size:
        problem = f"has shape {shape}; allowed is ({size},), one entry for each action of the action space"
    else:
        return path, prod(shape)
    raise UsageError(f"The observation {name!r} {problem}. Correct it, or rename it if it is an ordinary observation.")


def _named(space: Space, key: str, path: Path = ()) -> Iterator[tuple[Path, Space]]:
    """The parts of a nested space that a Dict calls ``key``, with their paths."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for name, part in parts:
            if name == key:
                yield (*path, name), part
            else:
                yield from _named(part, key, (*path, name))


def _with_batch_axis(space: Space, observation: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _with_batch_axis(part, observation[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_with_batch_axis(part, observation[index]) for index, part in enumerate(space.spaces))
    return np.asarray(observation)[None]

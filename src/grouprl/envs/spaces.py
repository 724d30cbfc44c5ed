"""An observation space at the beginning of a policy: observations become arrays.

The codec is built from the space of a *single* environment and works on batches as vector environments give them.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from grouprl.envs.masks import many_masks
from grouprl.envs.space_leaves import (
    Array,
    Image,
    Numbers,
    OneHots,
    Path,
    Space,
    image_layout,
    leaf_name,
    leaves_of,
    take,
)
from grouprl.errors import UsageError, error_text

_MASK = "action_mask"
"""What a Dict calls the action mask."""


class ObservationCodec:
    """Turns batched observations into the arrays a policy reads.

    Box (any shape and number dtype), Discrete and MultiDiscrete (one-hot, any start), MultiBinary, and Dict or Tuple of
    these, nested. All but images are concatenated into "flat" float32 [n, D]; each image (see ``image_layout``: uint8
    from 0 to 255, of at least 16 x 16) stays apart as "image:<path>" [n, C, H, W] in its own dtype.

    A leaf "action_mask" of a Dict, of zeros and ones, is the action mask and no input. ``mask_size`` is the size the
    action space needs: 0 means that it takes no masks; None accepts any size.

    Raises UsageError for an unsupported leaf, a leaf "action_mask" that cannot be one, or a space without
    any input.
    """

    def __init__(self, space: Space, mask_size: int | None = None) -> None:
        self.space = space
        self._mask_path, self._mask_size = _mask_leaf(space, mask_size)
        self._flat: list[Numbers | OneHots] = []
        self._images: dict[str, Image] = {}
        self._image_shapes: dict[str, tuple[int, int, int]] = {}
        self._shapes: list[tuple[Path, tuple[int, ...]]] = []
        self._leaf_spaces: list[Space] = []
        normalise: list[npt.NDArray[np.bool_]] = []
        scale: list[Array] = []
        n_flat = 0
        for path, leaf in leaves_of(space):
            shape = tuple(leaf.shape or ())
            self._shapes.append((path, shape))
            self._leaf_spaces.append(leaf)
            layout = image_layout(leaf)
            if path == self._mask_path:
                continue
            if layout is not None:
                key = f"image:{leaf_name(path)}"
                self._images[key] = Image(path, shape, layout)
                _, channels, height, width = self._images[key].channels_first(np.empty((1, *shape), np.uint8)).shape
                self._image_shapes[key] = (channels, height, width)
                continue
            if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete):
                sizes = np.atleast_1d(leaf.n if isinstance(leaf, spaces.Discrete) else leaf.nvec).ravel()
                columns = n_flat + np.cumsum(sizes, dtype=np.int64) - sizes
                lowest = np.broadcast_to(leaf.start, shape).ravel().astype(np.int64)
                self._flat.append(OneHots(path, shape, lowest, sizes.astype(np.uint64), columns.astype(np.int64)))
                width = int(sizes.sum())
                scale.append(np.repeat(np.sqrt(sizes), sizes).astype(np.float32))
            else:
                width = prod(shape)
                self._flat.append(Numbers(path, shape, n_flat, n_flat + width))
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
        return [leaf_name(path) for path, _ in self._shapes]

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
                None if isinstance(leaf, Numbers) else (leaf.lowest.tolist(), [int(size) for size in leaf.sizes]),
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
            width = leaf.stop - leaf.start if isinstance(leaf, Numbers) else int(leaf.sizes.sum())
            if component < width:
                where = f"component {component}"
                return f"{where} of {leaf_name(leaf.path)!r}" if leaf.path else where
            component -= width
        return f"component {component}"

    @np.errstate(all="ignore")  # what is too large becomes infinite, which is looked for
    def encode(self, observations: Any) -> dict[str, Array]:
        """The arrays of n observations in Gymnasium's batched layout (dicts and tuples of arrays [n, ...]).

        A single flat float32 Box and images come back as views of what was given: copy what is kept.
        Values are not checked for NaN. Raises UsageError for a Discrete value outside its space.
        """
        encoded: dict[str, Array] = {}
        if len(self._flat) == 1 and isinstance(self._flat[0], Numbers):
            values = np.asarray(take(observations, self._flat[0].path), dtype=np.float32)
            if values.ndim != 2:
                values = values.reshape(len(values), self._n_flat)
            encoded["flat"] = values
        elif self._n_flat:
            arrays = [np.asarray(take(observations, leaf.path)) for leaf in self._flat]
            flat = np.zeros((len(arrays[0]), self._n_flat), dtype=np.float32)
            for leaf, array in zip(self._flat, arrays, strict=True):
                leaf.write(flat, array)
            encoded["flat"] = flat
        for key, image in self._images.items():
            encoded[key] = image.channels_first(np.asarray(take(observations, image.path)))
        return encoded

    def numbers(self, observations: Any) -> npt.NDArray[np.float64]:
        """ "flat" before it becomes float32, [n, D]; 0 in one-hots. The observations are as in :meth:`encode`."""
        arrays = [np.asarray(take(observations, leaf.path)) for leaf in self._flat]
        flat = np.zeros((len(arrays[0]) if arrays else 0, self._n_flat))
        for leaf, array in zip(self._flat, arrays, strict=True):
            if isinstance(leaf, Numbers):
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
        values = np.asarray(take(observations, self._mask_path))
        return many_masks(values, len(values), self._mask_size)

    def is_batched(self, observation: Any) -> bool:
        """Whether this is a batch [n, ...] (True) or one observation (False); UsageError if it is neither."""
        try:
            given = {path: np.shape(take(observation, path)) for path, _ in self._shapes}
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
        shown = ", ".join(f"{leaf_name(path)!r} " * bool(path) + str(shape) for path, shape in given.items())
        wanted = ", ".join(f"{leaf_name(path)!r} " * bool(path) + str(shape) for path, shape in self._shapes)
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
    name = leaf_name(path)
    if len(found) > 1:
        raise UsageError(
            f"The observation space has {len(found)} leaves {_MASK!r}: "
            f"{', '.join(leaf_name(where) for where, _ in found)}; allowed is one, the mask of the actions. Rename the "
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

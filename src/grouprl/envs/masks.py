"""Masks of valid actions, in whatever form somebody gives them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from grouprl.errors import UsageError

Bools = npt.NDArray[np.bool_]


def one_mask(given: Any, size: int) -> Bools:
    """The mask ``[size]`` of one action.

    Args:
        given: zeros and ones, or booleans: an array of any shape, a list, a tuple, a tensor, or one of these for each
            component of a MultiDiscrete action.
        size: entries of a mask: the actions of a Discrete space, the choices of all components of a MultiDiscrete one.

    Raises:
        UsageError: another number of entries, or numbers other than 0 and 1.
    """
    values = _flat(given)
    if values.size != size:
        raise _wrong_size(np.shape(given) if isinstance(given, np.ndarray) else values.shape, 1, size)
    return _as_bools(values)


def many_masks(given: Any, n: int, size: int) -> Bools:
    """The masks ``[n, size]`` of ``n`` actions: one for each, or one for all of them.

    Args:
        given: as for :func:`one_mask`, or ``n`` such masks.
        n: how many actions. size: entries of each mask.

    Raises:
        UsageError: another number of masks or entries, or numbers other than 0 and 1.
    """
    rows: Any
    if isinstance(given, np.ndarray) and given.dtype != object:
        rows, values = given, _flat(given)
    else:
        values = _flat(given)
        rows = list(_plain(given)) if np.iterable(given) else [given]
    if values.size == n * size and (n == 1 or len(rows) == n):
        if isinstance(rows, list) and n > 1:
            return np.stack([one_mask(row, size) for row in rows])
        return _as_bools(values).reshape(n, size)
    if values.size == size:
        return np.tile(_as_bools(values), (n, 1))
    raise _wrong_size(np.shape(rows) if isinstance(rows, np.ndarray) else values.shape, n, size)


def _plain(given: Any) -> Any:
    """A tensor as an array, which it may have to be detached and copied from a GPU for."""
    return given.detach().cpu().numpy() if hasattr(given, "detach") else given


def _flat(given: Any) -> npt.NDArray[Any]:
    """The numbers in ``given`` in their order, ``[m]``, however they are nested."""
    given = _plain(given)
    if isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.dtype == object and given.ndim):
        parts = [_flat(part) for part in given]
        return np.concatenate(parts) if parts else np.zeros(0)
    values = np.asarray(given)
    if values.dtype.kind not in "biuf":
        raise UsageError(
            f"an action mask must hold zeros and ones, one for each action, and holds {given!r}; "
            "1 means that the action is allowed"
        )
    return values.ravel()


def _as_bools(values: npt.NDArray[Any]) -> Bools:
    if values.dtype == np.bool_:
        return values
    strange = (values != 0) & (values != 1)
    if strange.any():
        raise UsageError(
            f"an action mask holds {values[strange][0]}; allowed are 1 for an allowed and 0 for a forbidden "
            "action, or booleans: give mask > 0, or mask == 0 where it is added to logits"
        )
    return values.astype(np.bool_)


def _wrong_size(shape: tuple[int, ...], n: int, size: int) -> UsageError:
    many = f" or ({n}, {size})" if n > 1 else ""
    return UsageError(
        f"action_mask has shape {shape}, and the action space has {size} actions to mask; "
        f"give ({size},){many}: one entry per action"
    )

"""What a reward function returned, made numbers: the one place where it is checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, SupportsFloat

from grouprl.errors import TrainingError, first_line, shown
from grouprl.lm.prompts import Prompt
from grouprl.objective.groups import LARGEST_RETURN


def numbers_of(output: Any, whose: str, rows: Sequence[Prompt]) -> list[float]:
    """N floats, NaN for None: what a function, ``whose`` in messages, returned for completions of the prompts ``rows``.

    Raises TrainingError for anything but one finite number of moderate size, or None, per completion.
    """
    wanted = f"return a list of {len(rows)} numbers or None, one per completion"
    shape = getattr(output, "shape", None)
    if isinstance(shape, tuple) and len(shape) != 1:
        raise TrainingError(f"{whose} returned an array of shape {list(shape)}; {wanted}")
    try:
        entries = output.tolist() if hasattr(output, "tolist") else output
    except Exception as error:  # a tensor without values, or of another layout
        raise TrainingError(
            f"{whose} returned {shown(output)}, whose entries cannot be read ({first_line(error)}); {wanted}"
        ) from error
    if not isinstance(entries, list | tuple):
        raise TrainingError(f"{whose} returned {shown(output)} of {type(output).__name__}; {wanted}")
    if len(entries) != len(rows):
        raise TrainingError(f"{whose} returned {len(entries)} rewards for {len(rows)} completions; {wanted}")
    return [_number(entry, whose, i, rows) for i, entry in enumerate(entries)]


def plain_float(value: Any) -> float | None:
    """Whatever is one real number, as a float: also a Fraction, a Decimal, an array or tensor of no dimension.

    None if it is none. One beyond the range of floats is infinite.
    """
    if getattr(value, "shape", ()) == () and hasattr(value, "tolist"):  # numpy scalars, tensors of no dimension
        value = value.tolist()  # a masked one is None, which .item() makes 0
    if isinstance(value, str | bytes | complex) or getattr(value, "shape", ()) != ():
        return None
    if not isinstance(value, SupportsFloat):
        return None
    try:
        return float(value)
    except OverflowError:  # 10**400
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    except (TypeError, ValueError):
        return None


def _number(entry: Any, whose: str, i: int, rows: Sequence[Prompt]) -> float:
    if entry is None:
        return math.nan
    value = plain_float(entry)
    if value is None:
        raise TrainingError(
            f"{whose} returned {shown(entry)} of {type(entry).__name__} for {completion(i, rows)}; "
            "return a number or None for each completion"
        )
    if not abs(value) <= LARGEST_RETURN:
        raise TrainingError(
            f"{whose} returned {value} for {completion(i, rows)}; return a finite number, "
            f"at most {LARGEST_RETURN:g} in size, or None where the function does not apply"
        )
    return value


def completion(i: int, rows: Sequence[Prompt]) -> str:
    """Completion ``i`` of ``rows``, for a message."""
    prompt = rows[i].prompt
    return f"completion {i} of {len(rows)}, of the prompt {shown(prompt if isinstance(prompt, str) else prompt[-1])}"

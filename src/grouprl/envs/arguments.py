"""Arguments of functions that users call by hand, where Python would take whatever it can compare."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from grouprl.errors import UsageError, with_type


def whole_number(name: str, value: Any, least: int) -> int:
    """``value`` as an integer: one of Python or NumPy, or a float without a fraction, such as 1e5.

    Raises:
        UsageError: it is none, or below ``least``.
    """
    try:
        whole = isinstance(value, float | np.floating) and float(value).is_integer()
        number = int(value) if whole else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or isinstance(value, bool):
        raise UsageError(f"{name}={with_type(value)} must be a whole number, at least {least}")
    return number


def real_number(name: str, value: Any) -> float:
    """``value`` as a float: a number of Python or NumPy, infinite ones included.

    Raises:
        UsageError: it is none, or NaN.
    """
    kinds = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, kinds) or math.isnan(value):
        raise UsageError(f"{name}={with_type(value)} must be a number, such as 195 or -0.5")
    return float(value)


def yes_or_no(name: str, value: Any) -> bool:
    """``value`` as a bool of Python. Raises UsageError if it is none of Python or NumPy."""
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"{name}={with_type(value)} must be True or False")
    return bool(value)

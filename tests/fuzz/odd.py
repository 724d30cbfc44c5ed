"""Values that people and programs pass by mistake, and the one thing that may come of them beside a right result."""

from __future__ import annotations

import datetime
import enum
import math
import pathlib
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from grouprl.errors import GrouprlError

LONGEST = 3000
"""Characters of a message at most: an error must not print whole arrays."""


class Colour(enum.Enum):
    RED = 1


class Hostile:
    """An object with which hardly anything can be done."""

    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")

    def __repr__(self) -> str:
        return "<hostile>"


NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 64, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, 1e-12, 5e-324, 1e308,
    math.inf, -math.inf, math.nan, True, False, Fraction(1, 3), Decimal("0.1"), Decimal("NaN"), 1 + 2j,
    np.float32(0.5), np.float64("nan"), np.int8(3), np.int64(7), np.bool_(True), np.uint64(2**63),
    torch.tensor(3.0), torch.tensor(2), torch.tensor(math.nan), torch.tensor([0.5]),
]  # fmt: skip

OTHERS: list[Any] = [
    None, "", " ", "1", "0.5", "1e-3", "nan", "true", "none", "auto", "\ud800", "\x00", "ä" * 40, "x" * 5000, b"bytes",
    [], {}, (), set(), [1, 2], (64, 64), ["a"], [[1], [2]], [None], {"a": 1}, {1: 2}, {"a": {"b": [1, {}]}},
    frozenset({1}), range(3), iter([1]), np.zeros(0), np.zeros((2, 2)), np.array("text"), np.array([1, None], object),
    torch.zeros(3), torch.zeros(()), torch.float16, torch.device("cpu"), pathlib.Path("somewhere"), Colour.RED, Colour,
    int, len, lambda: None, object(), Hostile(), Ellipsis, NotImplemented, datetime.date(2020, 1, 1), slice(1, 2),
    float, str, ValueError("a value"), "a,b", "a: b", "[1, 2", "*x", "&a [*a]", "../../x", "/dev/null", "None", "-1",
]  # fmt: skip

values = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(OTHERS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers(-10, 10) | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


def result_or_clear_error(call: Callable[[], Any]) -> Any:
    """What `call` returns, or None if it raised an error of grouprl's own with a message for people.

    Every other exception is a fault, and goes on to the test.
    """
    try:
        return call()
    except GrouprlError as error:
        said = str(error)
        assert said.strip(), "an error without a message"
        if len(said) > LONGEST:
            raise AssertionError(f"a message of {len(said)} characters: {said[:200]} ...") from None
        assert "object at 0x" not in said or "object" in said
        return None

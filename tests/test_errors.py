"""What messages say of an error of other code."""

from __future__ import annotations

import pytest

from grouprl.errors import error_text


class SilentError(Exception):
    """One whose text cannot be read."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too large."), "ValueError: too large"),
        (KeyError("board"), "KeyError: 'board'"),
        (RuntimeError("\n  wrong shape:\n[2, 3]\n"), "RuntimeError: wrong shape:"),
        (ValueError("x" * 600), "ValueError: " + "x" * 497 + "..."),
        (AssertionError(), "AssertionError"),
        (EOFError("  \n"), "EOFError"),
        (SilentError(), "SilentError"),
    ],
)
def test_an_error_is_its_kind_and_the_first_line_of_what_it_says(error: Exception, line: str) -> None:
    assert error_text(error) == line


def test_all_lines_of_an_error_are_kept_where_they_are_asked_for() -> None:
    long = "wrong shape:\n" + "x" * 600 + "."
    assert error_text(RuntimeError(long), whole=True) == f"RuntimeError: {long}"
    assert error_text(AssertionError(), whole=True) == "AssertionError"
    assert error_text(SilentError(), whole=True) == "SilentError"

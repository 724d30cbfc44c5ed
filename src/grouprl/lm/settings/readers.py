"""How single values of settings are read: other forms of a value, and what its type and its bounds cannot say.

Each reader takes a value and returns it as the setting holds it. It raises ValueError, with what is allowed, for a
value that cannot be read. A reader that runs before the type is checked takes any value.
"""

from __future__ import annotations

import os
from typing import Any


def path(value: Any) -> Any:
    """A path as text, with the user's home folder for ``~``."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(path, str) and not _is_utf8(path):
        raise ValueError(
            "the name is no text in UTF-8, which saving a tokenizer needs; name another folder, or set PYTHONUTF8=1"
        )
    return os.path.expanduser(path) if isinstance(path, str) else path


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def strategy(value: Any) -> Any:
    """False is "no", because YAML reads a bare no as false. What transformers calls "best" has settings of its own."""
    if isinstance(value, str) and value == "best":
        raise ValueError(
            "must be 'no', 'steps' or 'epoch'; to keep the best model, set load_best_model_at_end=True and "
            "save_total_limit=1"
        )
    return "no" if value is False else value


def texts(value: Any) -> Any:
    """One text or several, None if there is none."""
    empty = isinstance(value, str | list | tuple) and not len(value)
    return None if empty else (value,) if isinstance(value, str) else value


def no_empty_text(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Stop strings, each with at least one character."""
    if value and not all(value):
        raise ValueError("must hold no empty text, which would end every completion")
    return value


def numbers(value: Any) -> Any:
    """One number or several."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def at_least_one(value: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Numbers of at least 1, None if there is none."""
    if value is not None and any(k < 1 for k in value):
        raise ValueError("must hold whole numbers of at least 1, such as [1, 4]")
    return value or None


def top_k(value: Any) -> Any:
    """None and vLLM's -1 are 0: all tokens."""
    return 0 if value is None or (type(value) is int and value == -1) else value


def number_of_transcripts(value: int | str) -> int | str:
    """A number of completions of at least 0, or "all"."""
    if isinstance(value, int) and value < 0:
        raise ValueError("must be at least 0, or 'all'")
    return value


def max_steps(value: int) -> int:
    """A number of steps, or -1."""
    if value == 0:
        raise ValueError("must be at least 1, or -1 for num_train_epochs to say")
    return value


def share_or_count(value: float | None) -> float | None:
    """A share of the run below 1, or a whole number of steps."""
    if value is not None and value >= 1 and not value.is_integer():
        raise ValueError("must be a whole number of steps, or a share of the run below 1")
    return int(value) if value is not None and value.is_integer() else value

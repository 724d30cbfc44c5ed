"""Mathematical answers compared by value: 1/2 is 0.5 and \\frac{1}{2}. Needs the extra `math` (math-verify)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from grouprl.errors import UsageError
from grouprl.extras import how_to_install
from grouprl.lm.rewards.text import Completion, column, completion_text
from grouprl.lm.rewards.worker import Worker

MAX_CHARACTERS = 4000
"""Only the last so many characters of a completion are read; an answer stands at the end."""

TIMEOUT = 5.0
"""Seconds a comparison may take; one that takes longer counts as unequal."""

_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}")


def math_accuracy(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[str | None] | None = None,
    solution: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 where the last expression of the completion equals the right answer, else 0; \\boxed{} goes before all others.

    The right answers are the column `answer`, or else `solution`: LaTeX with or without dollar signs, a number, or a
    text that ends in either. None where that answer is None or cannot be read.

    Raises UsageError if neither column is there or math-verify is not installed, TrainingError if it cannot be used.
    """
    if find_spec("math_verify") is None:
        raise UsageError(f"the reward math_accuracy needs math-verify; run: {how_to_install('math')}")
    name = "solution" if answer is None and solution is not None else "answer"
    golds = column(name, {"answer": answer, "solution": solution, **columns}, len(completions), "math_accuracy")
    replies = [completion_text(completion)[-MAX_CHARACTERS:] for completion in completions]
    verdicts = [
        None if gold is None else _worker.call(False, gold=str(gold), reply=reply)
        for gold, reply in zip(golds, replies, strict=True)
    ]
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def equal(gold: str, reply: str) -> bool | None:
    """Whether `reply` ends in an expression equal to `gold`, None if `gold` holds no expression; may take forever."""
    right = _read_gold(gold)
    if not right:
        return None
    library: Any = import_module("math_verify")
    return bool(library.verify(right, library.parse(reply, parsing_timeout=None), timeout_seconds=None))


@lru_cache(maxsize=1024)
def _read_gold(gold: str) -> list[Any]:
    """The expressions of a right answer: as it stands, else as LaTeX without its dollar signs. Prose holds none."""
    library: Any = import_module("math_verify")
    found: list[Any] = library.parse(gold, parsing_timeout=None)
    if not found and gold.strip() and not _WORDS.search(gold):
        found = library.parse(f"${gold.strip()}$", parsing_timeout=None)
    return found


_worker = Worker(f"{__name__}:equal", TIMEOUT, imports=["math_verify"])

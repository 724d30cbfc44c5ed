"""Any data set of reasoning-gym as a task, with its own scorer as the reward. Needs the extra `tasks`.

The same seed gives the same rows, except where reasoning-gym itself depends on PYTHONHASHSEED: word_ladder,
knight_swap, ransom_note, isomorphic_strings and polynomial_multiplication do in 0.1.25.
"""

from __future__ import annotations

import difflib
import inspect
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from grouprl.errors import UsageError
from grouprl.extras import how_to_install
from grouprl.lm.rewards.worker import Worker
from grouprl.lm.tasks.parsing import tagged
from grouprl.lm.tasks.task import Example, Task
from grouprl.lm.tasks.untrusted import is_algebra, is_literal, is_sum

PREFIX = "reasoning-gym:"

TIMEOUT = 10.0
"""Seconds that computer algebra may take over a reply; one that takes longer scores 0."""

_EVALUATING: dict[str, Callable[[str], bool]] = {
    "binary_matrix": is_literal,
    "countdown": is_sum,
    "intermediate_integration": is_algebra,
    "n_queens": is_literal,
    "number_sorting": lambda _: True,  # it evaluates its own answer, never the reply
    "polynomial_multiplication": is_algebra,
    "puzzle24": is_sum,
    "simple_integration": is_algebra,
    "spiral_matrix": is_literal,
    "string_insertion": is_literal,
}
_EVALUATES = re.compile(r"\b(?:eval|exec|sympify|parse_expr)\(")
_UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


@dataclass(frozen=True)
class ReasoningGym(Task):
    """The data set `dataset` of reasoning-gym, made with `options`, a JSON object.

    Raises UsageError if reasoning-gym is missing, has no such data set, or does not take the options.
    """

    dataset: str
    options: str = "{}"

    max_completion_length = 1024
    system = "Think as long as you need, then give your final answer between <answer> and </answer>."
    needs = ("entry",)

    def __post_init__(self) -> None:
        taken = {"seed", "size"} & set(json.loads(self.options))
        if taken:
            raise UsageError(f"task {self.name} has no option {taken.pop()!r}: entries are drawn one by one.")
        unsafe = self.dataset == "composite"  # its scorer is that of any other data set
        if not unsafe and self.dataset not in _EVALUATING:
            scorer = _scorer(self.dataset, self.options)
            unsafe = _EVALUATES.search(inspect.getsource(type(scorer).score_answer)) is not None
        if unsafe:
            raise UsageError(
                f"task {self.name}: its scorer may run a reply as Python code, which is not safe; choose another."
            )
        _scorer(self.dataset, self.options)

    @property
    def name(self) -> str:
        """reasoning-gym:NAME."""
        return PREFIX + self.dataset

    def draw(self, rng: random.Random) -> Example:
        """An example of either split. Column: entry, the entry of reasoning-gym as JSON."""
        entry = _create(self.dataset, self.options, seed=rng.randrange(2**31))[0]
        return Example(entry["question"], str(entry["answer"] or ""), columns={"entry": json.dumps(_packed(entry))})

    def parse(self, text: str) -> str:
        """What stands between <answer> and </answer>, else the whole reply; stripped."""
        inside = tagged(text)
        return text.strip() if inside is None else inside

    def score(self, reply: str, row: Mapping[str, Any]) -> float:
        """What the scorer of the data set says; 0 for a reply that it cannot read or must not be given."""
        entry, given = json.loads(row["entry"]), self.parse(reply)
        harmless = _EVALUATING.get(self.dataset)
        if harmless is not None and given != _unpacked(entry)["answer"] and not harmless(given):
            return 0.0
        if harmless is is_algebra:
            return float(_worker.call(0.0, dataset=self.dataset, options=self.options, given=given, entry=entry))
        return scored(self.dataset, self.options, given, entry)


def scored(dataset: str, options: str, given: str, entry: Any) -> float:
    """The score of `given` for a packed entry, by the scorer of a data set; 0 if it cannot read it."""
    try:
        return float(_scorer(dataset, options).score_answer(given, _unpacked(entry)))
    except _UNREADABLE:  # what scorers raise at replies of the wrong form, such as words for a number
        return 0.0


@lru_cache(maxsize=16)
def _scorer(dataset: str, options: str) -> Any:
    return _create(dataset, options, seed=0)


def _create(dataset: str, options: str, seed: int) -> Any:
    try:
        factory: Any = import_module("reasoning_gym.factory")
    except ImportError as error:
        raise UsageError(f"task {PREFIX}{dataset} needs reasoning-gym; run: {how_to_install('tasks')}") from error
    if dataset not in factory.DATASETS:
        close = difflib.get_close_matches(dataset, factory.DATASETS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see reasoning_gym.factory.DATASETS."
        raise UsageError(f"reasoning-gym has no data set {dataset!r}; {hint}")
    try:
        return factory.create_dataset(dataset, seed=seed, size=1, **json.loads(options))
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"task {PREFIX}{dataset} does not take the options {options}: {error}") from error


def _packed(value: Any) -> Any:
    """`value` as JSON that keeps tuples and keys that are no strings: scorers tell (1, 2) from [1, 2]."""
    if isinstance(value, dict):
        return {"dict": [[_packed(key), _packed(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item) for item in value]}
    return [_packed(item) for item in value] if isinstance(value, list) else value


def _unpacked(value: Any) -> Any:
    """The inverse of `_packed`."""
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    if isinstance(value, dict):
        (kind, items), *_ = value.items()
        if kind == "tuple":
            return tuple(_unpacked(item) for item in items)
        return {_unpacked(key): _unpacked(item) for key, item in items}
    return value


_worker = Worker(f"{__name__}:scored", TIMEOUT, imports=["reasoning_gym"])

"""Tasks with a checkable answer, drawn without end; `get` makes one, `dataset` draws rows of it.

    name               options          asks for                                reward                tokens
    nth-word           n_words=4        the third of four words                 1 if right            6
    arithmetic         operations=+-*   17 + 25, 40 - 7, 6 x 9                  1 if right            16
    multi-digit        digits=3         482 * 731, 900 - 417; operations, tool  1 if right            24
    letter-count       n_words=2        how often a letter occurs, 0 to 3       1 if right            8
    countdown          n_numbers=3      an expression that reaches a target     1; 0.1 for its form   8 a number
    reverse            length=6         letters from a to p, backwards          share of places       length + 2
    sort               length=6         digits from small to large              share of places       length + 2
    reasoning-gym:X    those of X       any data set X of reasoning-gym         its own scorer        1024

Each has a train and an eval split that share no question: the eval words of nth-word are in no train question, the
other tasks hold out one question in ten by its checksum. Your own data: :mod:`grouprl.lm.tasks.jsonl`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any

from grouprl.errors import UsageError
from grouprl.importing import load_function
from grouprl.lm.tasks import reasoning_gym
from grouprl.lm.tasks.arithmetic import Arithmetic
from grouprl.lm.tasks.countdown import Countdown
from grouprl.lm.tasks.letter_count import LetterCount
from grouprl.lm.tasks.multi_digit import MultiDigit
from grouprl.lm.tasks.nth_word import NthWord
from grouprl.lm.tasks.strings import Reverse, Sort
from grouprl.lm.tasks.task import Example, Message, Split, Task, dataset

__all__ = ["Example", "Message", "Split", "Task", "dataset", "get", "names"]

_TASKS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "letter-count": LetterCount,
    "multi-digit": MultiDigit,
    "nth-word": NthWord,
    "reverse": Reverse,
    "sort": Sort,
}


def names() -> list[str]:
    """The names of the tasks made here, sorted; those of reasoning-gym come on top."""
    return sorted(_TASKS)


def get(name: str, **options: Any) -> Task:
    """The task called `name`, or that of a class `module:Class` of your own, with `options` (see the table above).

    Raises UsageError for an unknown name or option, with the closest one there is, for a value that is not allowed, and
    if reasoning-gym is asked for but not installed.
    """
    if name.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.ReasoningGym(name.removeprefix(reasoning_gym.PREFIX), json.dumps(options, sort_keys=True))
    if ":" in name:
        return _own(name, options)
    if name not in _TASKS:
        close = difflib.get_close_matches(name, _TASKS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"no task {name!r}; {hint}There are: {', '.join(names())}, {reasoning_gym.PREFIX}NAME.")
    return _made(name, _TASKS[name], options)


def _own(name: str, options: dict[str, Any]) -> Task:
    kind = load_function(name)
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise UsageError(f"{name} is no subclass of grouprl.lm.tasks.Task")
    return _made(name, kind, options)


def _made(name: str, kind: Any, options: dict[str, Any]) -> Task:
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise UsageError(f"task {name} has no option {option!r}; it has: {', '.join(known)}.")
    task: Task = kind(**options)
    return task

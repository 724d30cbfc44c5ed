"""The interactions of a run: made of what the user gave, used again from episode to episode, and replaced if broken."""

from __future__ import annotations

import inspect
import itertools
import logging
import numbers
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from grouprl.errors import GrouprlError, TrainingError, UsageError, error_text, line_of_fault, shown, with_type
from grouprl.lm.agents.interaction import Interaction, Message, in_use
from grouprl.lm.agents.tool_use import Kind, Limits, ToolUse, kind_of, reward_functions
from grouprl.lm.agents.tools import Function, schema_of
from grouprl.lm.fingerprint import digest
from grouprl.lm.prompts import Prompt, PromptSource
from grouprl.lm.rewards.arguments import copied
from grouprl.lm.rewards.event_loop import EventLoop
from grouprl.lm.tokenising import TEMPLATE_COLUMN
from grouprl.machine.torch_defaults import torch_defaults
from grouprl.runs.time_limit import within
from grouprl.runs.watchdog import Watch

_log = logging.getLogger("grouprl")

Factory = Callable[[], Any]
ENVIRONMENT_COLUMN, SEED_COLUMN = "environment", "seed"
_NEEDED = ("tools", "gives_rewards", "keeps_time", "close")


class Interactions:
    """Makes interactions and keeps those that no episode uses.

    Args:
        factory: a callable that makes an environment, a mapping of several by name, or None for tools alone.
            What it makes is an :class:`Interaction`, or an environment of TRL's shape.
        tools: functions that the model may call, beside the methods of environments of TRL's shape.
        limits: of calls of tools. timeout: seconds in which an episode must have begun, or None.

    Attributes:
        rewards: a reward function for each class of environments that has ``get_reward``.
        gives_rewards: whether one of the environments gives rewards for turns.
        has_tools: whether there is any tool.
        reads: the columns of the dataset that some environment reads, or None if nobody can tell.
        described: environments and tools as plain values, which tell these from others.
        loop: where what is asynchronous runs, so that clients which belong to a loop keep theirs.

    Raises:
        UsageError: something that was given cannot be used.
    """

    def __init__(
        self, factory: Factory | Mapping[str, Factory] | None, tools: Sequence[Function] | None, limits: Limits,
        timeout: float | None,
    ) -> None:  # fmt: skip
        self._functions = _checked_tools(tools)
        self._schemas = [schema_of(function) for function in self._functions]
        self._limits, self._timeout = limits, timeout
        self.loop = EventLoop()
        self._watch = Watch("the beginning of an episode")
        self.several = isinstance(factory, Mapping)
        self._factories: dict[str | None, Factory | None] = (
            {str(name): make for name, make in factory.items()} if isinstance(factory, Mapping) else {None: factory}
        )
        self._kinds: dict[type, Kind] = {}
        self._idle: dict[str | None, list[Interaction]] = {}
        self._playing: dict[int, Interaction] = {}
        if not self._factories:
            raise UsageError("environment_factory is an empty mapping; give {'name': factory}")
        for name in self._factories:
            self._idle[name] = [self._make(name)]
        first = {name: idle[0] for name, idle in self._idle.items()}
        environments: list[Any] = [getattr(made, "environment", None) for made in first.values()]
        self.rewards = reward_functions(
            {
                type(e): (type(e).__name__, inspect.iscoroutinefunction(e.get_reward))
                for e in environments
                if callable(getattr(e, "get_reward", None))
            },
            self._playing_with,
        )
        self.gives_rewards = any(made.gives_rewards for made in first.values())
        known: list[Any] = [getattr(made, "reads", None) for made in first.values()]
        own = (SEED_COLUMN, ENVIRONMENT_COLUMN, TEMPLATE_COLUMN)
        self.reads = None if None in known else {*own, *itertools.chain.from_iterable(known)}
        self.has_tools = bool(self._functions) or any(made.tools for made in first.values())
        schemas = [*self._schemas, *(schema for made in first.values() for schema in made.tools)]
        self.described = {
            "environments": [f"{name or ''} {name_of(made)}".strip() for name, made in first.items()],
            "tools": [schema["function"]["name"] for schema in self._schemas],
            "tools as they are described": digest(schemas),
        }

    def check_rows(self, starts: PromptSource) -> None:
        """Raises UsageError if one of the first rows names no environment that there is, or has a seed that is none."""
        for index, row in starts.first_rows(ENVIRONMENT_COLUMN, SEED_COLUMN):
            where = f"row {index} of {starts.name}"
            if self._factories[self._name(row, where)] is not None:
                _seed_of(row.get(SEED_COLUMN), 0, where)

    def begin(self, row: Prompt, seed: int, where: str) -> tuple[Interaction, Sequence[Message] | str]:
        """An interaction that has begun an episode, and its prompt.

        Code of the user's that draws from the random generators of ``random``, ``numpy`` or torch draws from ``seed``
        too, so that the members of a group start equal.

        Args:
            row: the row of the dataset, which may have a seed of its own. seed: of its group. where: what the row is
                called in errors.

        Raises:
            GrouprlError: the environment cannot begin, or the row has a seed that is none.
        """
        name = self._name(row.columns, where)
        columns = {"prompt": row.prompt, **row.columns} if row.prompt else row.columns
        if self._factories[name] is not None:  # tools alone begin from no seed
            seed = _seed_of(row.columns.get(SEED_COLUMN), seed, where)
        for attempt in range(2):
            interaction = self._idle[name].pop() if self._idle[name] else self._make(name)
            own = copied(dict(columns))  # which the episode may change
            try:
                with torch_defaults(), _seeded(seed), self._watch:
                    prompt = within(self._timeout, lambda: interaction.begin(own, seed))  # noqa: B023
            except GrouprlError:
                raise
            except TimeoutError as error:
                if error.args or self._timeout is None:
                    raise _cannot_begin(interaction, where, error) from error
                said = f"{name_of(interaction)} had not begun {where} after {self._timeout:g} seconds"
                if attempt:
                    raise TrainingError(f"{said}, and neither had another one; raise tool_timeout") from None
                _log.warning("%s; it is replaced by a new one", said)
                continue
            except (Exception, SystemExit) as error:  # an environment that exits is no end of the program
                raise _cannot_begin(interaction, where, error) from error
            is_messages = isinstance(prompt, list | tuple) and all(isinstance(part, Mapping) for part in prompt)
            if not isinstance(prompt, str) and not is_messages:
                raise TrainingError(
                    f"{name_of(interaction)} began {where} with {shown(prompt)} of type {type(prompt).__name__}; give "
                    "text or messages, such as {'role': 'user', 'content': '...'}"
                )
            self._playing[id(interaction)] = interaction
            return interaction, prompt if isinstance(prompt, str) else [copied(dict(message)) for message in prompt]
        raise AssertionError

    def give_back(self, row: Prompt, interaction: Interaction, *, broken: bool) -> None:
        """An episode is over; a broken interaction is not used again."""
        self._playing.pop(id(interaction), None)
        if not broken:
            self._idle[self._name(row.columns, "")].append(interaction)

    def close(self) -> None:
        """Close all that are idle; more are made when they are needed."""
        for idle in self._idle.values():
            while idle:
                interaction = idle.pop()
                try:
                    with torch_defaults():
                        closing: Any = within(self._timeout, interaction.close)
                        if inspect.isawaitable(closing):
                            self.loop.run(closing, self._timeout)
                except (Exception, SystemExit) as error:  # the training is over, and its result stands
                    _log.warning("%s could not be closed: %s", name_of(interaction), error_text(error))
        self.loop.close()

    def _playing_with(self, environment: Any) -> ToolUse:
        return next(i for i in self._playing.values() if isinstance(i, ToolUse) and i.environment is environment)

    def _name(self, columns: Mapping[str, Any], where: str) -> str | None:
        if not self.several:
            return None
        name = columns.get(ENVIRONMENT_COLUMN)
        if not isinstance(name, str) or name not in self._factories:
            raise UsageError(
                f"{where} names the environment {shown(name)} in column {ENVIRONMENT_COLUMN!r}; environment_factory "
                f"has {', '.join(map(repr, self._factories))}"
            )
        return name

    def _make(self, name: str | None) -> Interaction:
        factory, called = self._factories[name], f"environment_factory{'' if name is None else f'[{name!r}]'}"
        if factory is None:
            return ToolUse(self._functions, self._schemas, self._limits, self.loop)
        if not callable(factory):
            raise UsageError(
                f"{called} is {shown(factory)}, which cannot be called; give a class, or a function that makes an "
                "environment"
            )
        try:
            with torch_defaults(), Watch(called):
                made = factory()
        except GrouprlError:
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(
                f"{called} raised {error_text(error)}{line_of_fault(error)}; it is called without arguments and "
                "returns an environment"
            ) from error
        others = itertools.chain(self._playing.values(), *self._idle.values())
        if any(made is other or made is getattr(other, "environment", other) for other in others):
            raise in_use(called, made)
        if callable(getattr(made, "begin", None)) and callable(getattr(made, "answer", None)):
            if self._functions:
                raise UsageError(
                    f"tools are given beside {name_of(made)}, which answers turns itself; leave tools out, or let the "
                    "environment call them"
                )
            lacking = [what for what in _NEEDED if not hasattr(made, what)]
            if lacking:
                raise UsageError(
                    f"{name_of(made)} has begin and answer, but no {' and no '.join(lacking)}; derive its class from "
                    "grouprl.lm.agents.interaction.Interaction, and define what is missing"
                )
            return made  # type: ignore[no-any-return]
        kind = self._kinds.get(type(made))
        if kind is None:
            kind = self._kinds[type(made)] = kind_of(made)
        return ToolUse(
            self._functions, self._schemas, self._limits, self.loop, made, kind, all_columns=not self.several
        )


def name_of(interaction: Any) -> str:
    """An interaction, for messages."""
    return str(getattr(interaction, "name", f"the environment {type(interaction).__name__}"))


def _cannot_begin(interaction: Interaction, where: str, error: BaseException) -> TrainingError:
    return TrainingError(
        f"{name_of(interaction)} raised {error_text(error)} when it began {where}; the fault is inside its reset"
        f"{line_of_fault(error)}"
    )


def _seed_of(given: Any, of_group: int, where: str) -> int:
    """The seed in a column, as whatever kind of number, or the group's where there is None."""
    if given is None:
        return of_group
    value = given.tolist() if getattr(given, "shape", None) == () else given  # of NumPy or torch
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not -(2**63) < value < 2**63 or value != int(value):
        raise UsageError(
            f"{where} has {with_type(given)} in column {SEED_COLUMN!r}, from which its episodes begin; give a whole "
            "number, or None for a seed of grouprl's, or rename the column"
        )
    return int(value)


def _checked_tools(tools: Any) -> list[Function]:
    if tools is None:
        return []
    if callable(tools):
        raise UsageError(
            f"tools is {shown(tools)}; give a list of functions: tools=[{getattr(tools, '__name__', 'f')}]"
        )
    if not isinstance(tools, list | tuple):
        raise UsageError(f"tools is {shown(tools)}; give a list of functions")
    return list(tools)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random generators that a process shares, and put them back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])

"""Tools, and environments whose public methods are tools, as the other side of an episode: TRL's shape.

Such an environment is any object with ``reset(**row)``. What ``reset`` returns is added to the prompt, the methods of
its class are tools, and ``get_reward()`` judges the whole episode. Beyond TRL's, an attribute ``done`` or a method
``is_done()`` ends the episode, ``get_turn_reward()`` is the reward of a turn, and a parameter ``seed`` of ``reset`` is
given a number that is equal for all members of a group.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grouprl.errors import TrainingError, UsageError, shown, with_type
from grouprl.lm.agents.interaction import Answer, Interaction, Message, Said
from grouprl.lm.agents.tool_calls import Schema
from grouprl.lm.agents.tools import Function, Tools, schema_of
from grouprl.lm.messages import text_of
from grouprl.lm.rewards.arguments import copied
from grouprl.lm.rewards.event_loop import EventLoop
from grouprl.lm.rewards.returned import plain_float
from grouprl.objective.groups import LARGEST_RETURN
from grouprl.runs.time_limit import within

_log = logging.getLogger("grouprl")

NEVER_TOOLS = ("reset", "close", "get_reward", "get_turn_reward", "is_done")
"""Public methods of an environment that the model is not shown."""


@dataclass(frozen=True)
class Kind:
    """What is known of all environments that one factory makes.

    Attributes:
        name: its class, for messages and metrics. methods: the names of those that are tools. schemas: their schemas.
    """

    name: str
    methods: tuple[str, ...]
    schemas: tuple[Schema, ...]


@dataclass(frozen=True)
class Limits:
    """What bounds the calls of tools: seconds, characters of what one returns, and turns whose tools are called."""

    timeout: float | None
    most: int
    iterations: int | None


def kind_of(environment: Any) -> Kind:
    """What there is to know of an environment.

    Raises:
        UsageError: it has no ``reset``, or a method that cannot be described to the model.
    """
    name = type(environment).__name__
    if not callable(getattr(environment, "reset", None)):
        raise UsageError(
            f"environment_factory makes a {name}, which has no method reset; give it one: def reset(self, **row), "
            "which begins an episode and returns text for the prompt or None"
        )
    methods = tuple(_tool_methods(type(environment)))
    what = f"method of the environment {name}"
    return Kind(name, methods, tuple(schema_of(getattr(environment, method), what) for method in methods))


def _tool_methods(cls: type) -> list[str]:
    """Public methods of the class and its bases, but for bases of other packages that are installed.

    So what it has of a framework is none of its tools, and what it has of a base class of the user's is.
    """
    home = cls.__module__.partition(".")[0]
    names: dict[str, bool] = {}
    for base in cls.__mro__:
        own = base.__module__.partition(".")[0] == home or not _is_installed(base)
        for name, value in vars(base).items():
            is_method = inspect.isfunction(value) or isinstance(value, staticmethod | classmethod)
            names.setdefault(name, own and is_method)
    return sorted(name for name, is_tool in names.items() if is_tool and name[0] != "_" and name not in NEVER_TOOLS)


def _is_installed(cls: type) -> bool:
    """Whether a class is Python's own, or of a package that pip installed."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None:
        return cls.__module__ != "__main__"
    places = [path for path in (sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")) if path]
    return any(Path(file).resolve().is_relative_to(Path(place).resolve()) for place in places)


class ToolUse(Interaction):
    """Plays episodes with tools, and with an environment if there is one.

    An episode ends when the model calls no tool, when the environment is done, or when its calls are used up.

    Args:
        functions: the tools that belong to no environment. schemas: their schemas.
        limits: of the calls. loop: where asynchronous functions run.
        environment: the environment, or None. kind: what is known of it.
        all_columns: whether ``reset`` is given the column ``environment`` too.

    Attributes:
        environment: as given.
        broken: whether a call of the environment has not returned, so that it cannot be used any more.
    """

    keeps_time = True

    def __init__(
        self, functions: Sequence[Function], schemas: Sequence[Schema], limits: Limits, loop: EventLoop,
        environment: Any = None, kind: Kind | None = None, *, all_columns: bool = True,
    ) -> None:  # fmt: skip
        self.environment, self._kind, self._all_columns = environment, kind, all_columns
        self._limits, self._loop = limits, loop
        methods = [getattr(environment, name) for name in kind.methods] if kind is not None else []
        self.tools = [*schemas, *(kind.schemas if kind is not None else ())]
        self._own = frozenset(kind.methods if kind is not None else ())
        self._tools = Tools([*functions, *methods], limits.timeout, limits.most, loop, self.tools)
        self.gives_rewards = callable(getattr(environment, "get_turn_reward", None))
        self.broken = False
        self._turns = self._calling = 0

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return "the tools" if self._kind is None else f"the environment {self._kind.name}"

    def begin(self, row: Mapping[str, Any], seed: int) -> Sequence[Message] | str:
        """The prompt of the row, with what ``reset`` returns added to its last message."""
        self._turns = self._calling = 0
        prompt: Any = copied(row.get("prompt")) or [{"role": "user", "content": ""}]  # reset has the row's own
        if self.environment is None:
            return list(prompt) if not isinstance(prompt, str) else prompt
        return self._with_observation(prompt, self._reset(row, seed))  # type: ignore[no-any-return]

    def answer(self, said: Said) -> Answer:
        """Call the tools that the turn asks for."""
        self._turns += 1
        calls = (self.tools and said.message.get("tool_calls")) or []
        if not calls and said.fault is None:
            # A turn that was cut off may have been about to call a tool.
            return self._judged(Answer(terminated=said.finished, truncated=not said.finished))
        limit = self._limits.iterations
        if limit is not None and self._calling >= limit:
            return self._judged(Answer(truncated=True))
        self._calling += 1
        if said.fault is not None:
            content = str({"error": said.fault})
            counts = {"tools/calls": 1.0, "tools/failures": 1.0, "tools/parse_failures": 1.0}
            return self._judged(Answer([{"role": "tool", "name": "error", "content": content}], metrics=counts))
        messages, failures, late = [], 0, 0
        for call in calls:
            function = call["function"]
            outcome = self._tools.call(function["name"], function.get("arguments", {}))
            failures += outcome.failed
            late += outcome.late
            if outcome.late and function["name"] in self._own and not self.broken:
                self.broken = True
                _log.warning("%s is replaced by a new one: %s", self.name, outcome.text)
            messages.append({"role": "tool", "name": function["name"], "content": outcome.text})
        counts = {"tools/calls": float(len(calls)), "tools/failures": float(failures), "tools/timeouts": float(late)}
        done = not self.broken and self._done()
        return self._judged(Answer(messages, terminated=done, truncated=self.broken, metrics=counts))

    def reward(self) -> Any:
        """What ``get_reward`` says of the whole episode; 0.0 if it hangs, and then the environment is broken."""
        return self._ask("get_reward", 0.0)

    async def reward_later(self) -> Any:
        """As :meth:`reward`, of an asynchronous ``get_reward``, within the loop where several are waited for."""
        task = asyncio.ensure_future(self.environment.get_reward())
        done, _ = await asyncio.wait({task}, timeout=self._limits.timeout)
        if done:
            return task.result()
        task.cancel()
        self._give_up("get_reward")
        return 0.0

    def close(self) -> Any:
        """Call the environment's own ``close``, if it has one. Returns what that returns, which may be awaitable."""
        close = getattr(self.environment, "close", None)
        return close() if callable(close) and not self.broken else None

    def _reset(self, row: Mapping[str, Any], seed: int) -> Any:
        reset = self.environment.reset
        given = {key: value for key, value in row.items() if self._all_columns or key != "environment"}
        given.setdefault("prompt", [{"role": "user", "content": ""}])
        parameters = inspect.signature(reset).parameters
        if "seed" in parameters or "seed" in given:
            given["seed"] = seed
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            given = {key: value for key, value in given.items() if key in parameters}
        observation = reset(**given)
        if inspect.isawaitable(observation):
            observation = self._loop.run(observation, self._limits.timeout)
        return observation

    def _with_observation(self, prompt: Any, observation: Any) -> Any:
        if isinstance(observation, list) and all(
            isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in observation
        ):
            observation = text_of(observation)
        if observation is not None and not isinstance(observation, str):
            raise UsageError(
                f"reset of {self.name} returned {shown(observation)} of type {type(observation).__name__}; return text "
                "for the prompt, or None"
            )
        if isinstance(prompt, str):
            prompt = prompt + (observation or "")
            empty = not prompt.strip()
        else:
            *before, last = prompt
            prompt = [*before, {**last, "content": text_of(last.get("content")) + (observation or "")}]
            empty = not prompt[-1]["content"].strip()
        if empty:
            raise UsageError(
                f"reset of {self.name} returned {observation!r}, and the row of the dataset has no prompt; return the "
                "prompt from reset, or give the dataset a column 'prompt'"
            )
        return prompt

    def _done(self) -> bool:
        if self.environment is None:
            return False
        if callable(getattr(self.environment, "is_done", None)):
            said = self._ask("is_done", False)
            if plain_float(said) not in (0.0, 1.0):
                raise TrainingError(
                    f"is_done of {self.name} returned {with_type(said)} after turn {self._turns}; return True or False"
                )
            return bool(said)
        done = getattr(self.environment, "done", False)  # of any type where it means something else
        return not callable(done) and plain_float(done) == 1.0

    def _judged(self, answer: Answer) -> Answer:
        """With the reward of the turn, if the environment has one; without an end of its own if it hangs."""
        reward = 0.0
        if self.gives_rewards and not self.broken:
            reward = reward_of(
                self._ask("get_turn_reward", 0.0), f"what get_turn_reward of {self.name} gave turn {self._turns}"
            )
        if not self.broken:
            return replace(answer, reward=reward)
        return replace(answer, terminated=False, truncated=True)

    def _ask(self, method: str, late: Any) -> Any:
        """What a method of the environment returns, sync or async; ``late`` if it hangs, and then it is broken."""
        seconds = self._limits.timeout
        try:
            said = within(seconds, getattr(self.environment, method))
            return self._loop.run(said, seconds) if inspect.isawaitable(said) else said
        except TimeoutError as error:
            if error.args or seconds is None:  # its own
                raise
            self._give_up(method)
            return late

    def _give_up(self, method: str) -> None:
        self.broken, seconds = True, self._limits.timeout
        _log.warning("%s is replaced by a new one: its %s had not returned after %g s", self.name, method, seconds)


def reward_of(given: Any, whose: str) -> float:
    """A reward that code of the user's returned, as a float.

    Raises:
        TrainingError: it is not one finite number of moderate size.
    """
    value = None if given is None else plain_float(given)
    if value is None:
        raise TrainingError(f"{whose} is {shown(given)} of type {type(given).__name__}; give a number")
    if not abs(value) <= LARGEST_RETURN:
        raise TrainingError(f"{whose} is {value}; give a finite number, at most {LARGEST_RETURN:g} in size")
    return value


def reward_functions(
    kinds: Mapping[type, tuple[str, bool]], playing: Callable[[Any], ToolUse]
) -> list[Callable[..., Any]]:  # fmt: skip
    """A reward function for each class of environments with ``get_reward``, None for environments of other classes.

    Args:
        kinds: for each class its name and whether ``get_reward`` is asynchronous.
        playing: what plays with an environment.
    """
    return [_reward_function(cls, name, is_async, playing) for cls, (name, is_async) in kinds.items()]


def _reward_function(cls: Any, name: str, is_async: bool, playing: Callable[[Any], ToolUse]) -> Callable[..., Any]:
    def judged(environments: Sequence[Any]) -> list[Any]:
        return [playing(e).reward() if type(e) is cls else None for e in environments]

    async def judged_side_by_side(environments: Sequence[Any]) -> list[Any]:
        mine = [i for i, e in enumerate(environments) if type(e) is cls]
        found = await asyncio.gather(*(playing(environments[i]).reward_later() for i in mine))
        values: list[Any] = [None] * len(environments)
        for i, value in zip(mine, found, strict=True):
            values[i] = value
        return values

    function: Any = judged_side_by_side if is_async else judged
    function.__name__, function.whose = name, f"get_reward of the environment {name}"
    return function  # type: ignore[no-any-return]

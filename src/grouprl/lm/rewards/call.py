"""Calling reward functions as TRL does, and checking every number they return.

A reward function is called once per batch, with one entry per completion in every list::

    def reward(prompts, completions, completion_ids, answer, **kwargs) -> list[float | None]

Beside these three it is given every other column of the dataset under its name, ``trainer_state``, and two functions:
``log_extra(column, values)`` keeps a column beside the completions, ``log_metric(name, value)`` logs a number. A
function without ``**kwargs`` is given only what its signature names. None says that it does not apply to a completion.
Functions may be asynchronous; those wait side by side.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.errors import GrouprlError, TrainingError, UsageError
from grouprl.lm.prompts import Prompt

RewardFunction = Callable[..., Any]
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_LARGEST = 1e30
"""Of a reward, in size: squares of larger ones leave the range of numbers."""
_OWN_METRICS = re.compile(
    r"reward|reward_std|frac_reward_zero_std|rewards/.+/(mean|std)|num_tokens|loss|grad_norm|entropy|kl|learning_rate"
    r"|completions/((mean|min|max)_(terminated_)?length|clipped_ratio)|clip_ratio/.+|cispo_clip_ratio|sampling/.+"
    r"|dynamic_sampling/.+|step|step_time|epoch|sampled_tokens|runtime|samples_per_second|eval_(reward|accuracy)"
    r"|train_(seconds|runtime|loss|steps_per_second|samples_per_second)"
)
"""What is logged anyway."""


@dataclass(frozen=True)
class Rewards:
    """What the reward functions said about N completions."""

    values: Tensor
    """[N, F] float64; NaN where a function does not apply."""
    names: tuple[str, ...]
    """The F functions."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns of `log_extra`, N entries each."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means of what `log_metric` was given."""


def total(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """[N]: the weighted sum of rewards [N, F] over the functions that apply; weights [F], default 1."""
    return (values if weights is None else values * weights.to(values)).nansum(dim=1)


class RewardCaller:
    """The reward functions of a run.

    Attributes:
        names: what each is called in metrics: its ``__name__``, numbered where two are equal.
        weights: ``[F]`` float64.

    Raises UsageError if there is no function, one is none, or the weights do not fit.
    """

    def __init__(
        self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None
    ) -> None:
        given: list[Any] = [*functions] if isinstance(functions, list | tuple) else [functions]
        if not given:
            raise UsageError("reward_funcs is empty; give at least one reward function")
        for function in given:
            _check_function(function)
        self._functions: list[RewardFunction] = given
        self.names = _unique([_name(function) for function in given])
        if weights is not None and len(weights) != len(given):
            raise UsageError(
                f"reward_weights has {len(weights)} numbers for {len(given)} reward functions "
                f"({', '.join(self.names)}); give one for each"
            )
        self.weights = torch.tensor([1.0] * len(given) if weights is None else list(weights), dtype=torch.float64)
        if not bool(torch.isfinite(self.weights).all()):
            raise UsageError(f"reward_weights must be finite numbers, got {list(weights or ())}")
        self._loop = _Loop()

    def __call__(
        self,
        rows: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: Any = None,
    ) -> Rewards:
        """Rewards of N completions; `rows` holds the prompt of each, so a group's prompt G times.

        A completion of messages is handed over as a list of one assistant message.

        Raises UsageError if a function asks for what there is not, or none applies to a completion; TrainingError if
        one fails or returns anything but one finite number or None per completion.
        """
        log = _Log()
        offered = {
            **_columns(rows),
            "prompts": [row.prompt for row in rows],
            "completions": [row.completion(text) for row, text in zip(rows, completions, strict=True)],
            "completion_ids": [list(ids) for ids in completion_ids],
            "trainer_state": trainer_state,
            "log_extra": log.extra,
            "log_metric": log.metric,
        }
        returned = self._run(offered)
        columns = [_numbers(output, name, rows) for name, output in zip(self.names, returned, strict=True)]
        values = torch.tensor(columns, dtype=torch.float64).reshape(len(columns), len(rows)).T.contiguous()
        unscored = torch.isnan(values).all(dim=1).nonzero()
        if unscored.numel():
            raise UsageError(
                f"no reward function applies to {_sample(int(unscored[0]), rows)}: {', '.join(self.names)} returned "
                "None; return a number for every completion from at least one of them"
            )
        return Rewards(values, self.names, log.columns(len(rows)), log.means())

    def _run(self, offered: Mapping[str, Any]) -> list[Any]:
        arguments = [
            _arguments(function, name, offered) for function, name in zip(self._functions, self.names, strict=True)
        ]
        outputs: list[Any] = [None] * len(arguments)
        waiting: dict[int, Awaitable[Any]] = {}
        try:
            # The plain ones first: an asynchronous one starts only when it is awaited.
            for i, function in enumerate(self._functions):
                outputs[i] = _guarded(self.names[i], functools.partial(function, **arguments[i]))
                if inspect.isawaitable(outputs[i]):
                    waiting[i] = outputs[i]
        except BaseException:
            for awaitable in waiting.values():
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
            raise
        if waiting:
            for i, output in zip(waiting, self._loop.gather(list(waiting.values())), strict=True):
                if isinstance(output, GrouprlError):
                    raise output
                if isinstance(output, BaseException):
                    raise _failed(self.names[i], output) from output
                outputs[i] = output
        return outputs


class _Log:
    """Collects what functions log during one call."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep `values`, one per completion, as a column beside the completions."""
        self._columns.setdefault(str(column), []).extend(values)

    def metric(self, name: str, value: float) -> None:
        """Log `value`; several of one name are averaged, NaN left out."""
        if _OWN_METRICS.fullmatch(str(name)):
            raise UsageError(f"log_metric({name!r}, ...): grouprl logs a number of that name itself; choose another")
        if math.isinf(value):
            raise TrainingError(f"log_metric({name!r}, {value!r}): give a finite number")
        values = self._metrics.setdefault(str(name), [])
        if not math.isnan(value):
            values.append(float(value))

    def columns(self, n: int) -> dict[str, list[Any]]:
        for column, values in self._columns.items():
            if len(values) != n:
                raise TrainingError(
                    f"log_extra({column!r}, ...) was given {len(values)} values for {n} completions; give one for each"
                )
        return self._columns

    def means(self) -> dict[str, float]:
        return {name: math.fsum(values) / len(values) for name, values in self._metrics.items() if values}


class _Loop:
    """An event loop in a thread of its own: works inside a notebook, and clients that belong to a loop keep theirs."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def gather(self, awaitables: list[Awaitable[Any]]) -> list[Any]:
        """Wait for all side by side; an exception stands in the place of the result it prevented."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._loop.run_forever, name="grouprl-rewards", daemon=True)
            thread.start()

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*awaitables, return_exceptions=True)

        future = asyncio.run_coroutine_threadsafe(all_of_them(), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: the functions must not go on unseen
            future.cancel()
            raise


def _check_function(function: Any) -> None:
    if isinstance(function, str | nn.Module):
        what = repr(function) if isinstance(function, str) else f"a {type(function).__name__}"
        raise UsageError(
            f"reward_funcs holds {what}: a reward model is not called for you; wrap it in a function that takes "
            "prompts and completions, runs the model under torch.no_grad() and returns a list of floats"
        )
    if isinstance(function, type):
        raise UsageError(
            f"reward_funcs holds the class {function.__name__}; give an instance: {function.__name__}(...)"
        )
    if not callable(function):
        raise UsageError(f"reward_funcs holds {function!r}, which cannot be called; give a function or a list of them")


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    # The brackets of <lambda> would be trouble in the names of files and metrics.
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")


def _unique(names: list[str]) -> tuple[str, ...]:
    unique: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return tuple(unique)


def _columns(rows: Sequence[Prompt]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row.columns)
    for name in names:
        if name in RESERVED:
            raise UsageError(
                f"the dataset has a column {name!r}, under which reward functions are given something else; rename it: "
                f"dataset.rename_column({name!r}, ...)"
            )
    return {name: [row.columns.get(name) for row in rows] for name in names}


def _arguments(function: RewardFunction, name: str, offered: Mapping[str, Any]) -> dict[str, Any]:
    """What `function` is called with: everything if it takes ``**kwargs``, else what its signature names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return _owned(offered)
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UsageError(
                f"reward function {name!r} takes {parameter.name!r} by position only, but is called by name; remove "
                "the slash from its signature"
            )
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name not in offered:
            columns = ", ".join(key for key in offered if key not in RESERVED) or "none"
            raise UsageError(
                f"reward function {name!r} asks for {parameter.name!r}, which is neither a column of the dataset "
                f"({columns}) nor one of {', '.join(RESERVED)}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return _owned(offered)
    wanted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return _owned({key: value for key, value in offered.items() if key in wanted})


def _owned(offered: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of the function's own, one for each completion, which it may change."""
    given = ("trainer_state", "log_extra", "log_metric")
    return {key: value if key in given else [_copied(entry) for entry in value] for key, value in offered.items()}


def _copied(value: Any) -> Any:
    """A copy of nested lists and mappings; whatever else there is stays what it is."""
    if type(value) is list:
        return [_copied(entry) for entry in value]
    return {key: _copied(entry) for key, entry in value.items()} if type(value) is dict else value


def _guarded(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except GrouprlError:  # it says what is wrong and how to fix it already
        raise
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def _failed(name: str, error: BaseException) -> TrainingError:
    return TrainingError(
        f"reward function {name!r} raised {type(error).__name__}: {error}; let it return 0.0, or None where it does "
        "not apply, for completions it cannot judge"
    )


def _numbers(output: Any, name: str, rows: Sequence[Prompt]) -> list[float]:
    """N floats, NaN for None."""
    wanted = f"return a list of {len(rows)} numbers or None, one per completion"
    shape = getattr(output, "shape", None)
    if shape is not None and len(shape) != 1:
        raise TrainingError(f"reward function {name!r} returned an array of shape {list(shape)}; {wanted}")
    entries = output.tolist() if hasattr(output, "tolist") else output
    if not isinstance(entries, list | tuple):
        raise TrainingError(f"reward function {name!r} returned {_short(output)} of {type(output).__name__}; {wanted}")
    if len(entries) != len(rows):
        raise TrainingError(
            f"reward function {name!r} returned {len(entries)} rewards for {len(rows)} completions; {wanted}"
        )
    return [_number(entry, name, i, rows) for i, entry in enumerate(entries)]


def _number(entry: Any, name: str, i: int, rows: Sequence[Prompt]) -> float:
    if entry is None:
        return math.nan
    if getattr(entry, "shape", None) == () and hasattr(entry, "item"):  # numpy scalars, tensors of no dimension
        entry = entry.item()
    if not isinstance(entry, numbers.Real):
        raise TrainingError(
            f"reward function {name!r} returned {_short(entry)} of {type(entry).__name__} for {_sample(i, rows)}; "
            "return a number or None for each completion"
        )
    value = float(entry)
    if not abs(value) <= _LARGEST:
        raise TrainingError(
            f"reward function {name!r} returned {value} for {_sample(i, rows)}; return a finite number, "
            f"at most {_LARGEST:g} in size, or None where the function does not apply"
        )
    return value


def _sample(i: int, rows: Sequence[Prompt]) -> str:
    prompt = rows[i].prompt
    return f"completion {i} of {len(rows)}, of the prompt {_short(prompt if isinstance(prompt, str) else prompt[-1])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

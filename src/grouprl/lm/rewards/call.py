"""Calling reward functions as TRL does, and checking every number they return.

A reward function is called once per batch, with one entry per completion in every list::

    def reward(prompts, completions, completion_ids, answer, **kwargs) -> list[float | None]

Beside these three it is given every other column of the dataset under its name, ``trainer_state``, and two functions:
``log_extra(column, values)`` keeps a column beside the completions, ``log_metric(name, value)`` logs a number. A
function without ``**kwargs`` is given only what its signature names. None says that it does not apply to a completion.
Functions may be asynchronous; those wait side by side.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.errors import GrouprlError, TrainingError, UsageError, error_text, shown
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards.arguments import RESERVED, arguments_for, check_names, columns_of
from grouprl.lm.rewards.event_loop import EventLoop, Late
from grouprl.lm.rewards.returned import completion, numbers_of, plain_float
from grouprl.machine.torch_defaults import torch_defaults
from grouprl.runs.time_limit import Expired, within
from grouprl.runs.watchdog import Watch

RewardFunction = Callable[..., Any]
_OWN_METRICS = re.compile(
    r"reward|reward_std|frac_reward_zero_std|rewards/.+/(mean|std)|num_tokens|loss|grad_norm|entropy|kl|learning_rate"
    r"|completions/((mean|min|max)_(terminated_)?length|clipped_ratio)|clip_ratio/.+|cispo_clip_ratio|sampling/.+"
    r"|dynamic_sampling/.+|episodes/.+|tools/.+|environment/.+|step|step_time|epoch|sampled_tokens|runtime|samples_per_second|eval_(reward|accuracy)"
    r"|train_(seconds|runtime|loss|steps_per_second|samples_per_second)"
)
"""What is logged anyway."""


def is_own_metric(name: Any) -> bool:
    """Whether something of this name is logged anyway, or it is no name."""
    return not isinstance(name, str) or not name.isprintable() or _OWN_METRICS.fullmatch(name) is not None


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
    """[N]: the weighted sum of rewards [N, F] over the functions that apply; weights [F], default 1.

    A sum over several functions is rounded to 12 digits of its largest term: 0.1 + 0.2 - 0.3 is 0, and not 5e-17.
    """
    terms = values if weights is None else values * weights.to(values)
    terms = terms.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    found = terms.sum(dim=1)
    if terms.shape[1] < 2:
        return found
    largest = terms.abs().amax(dim=1)
    scale = 10.0 ** (11 - largest.log10().floor())
    usual = (largest > 1e-200) & (largest < 1e200)
    return torch.where(usual, torch.round(found * scale) / scale, found)


class RewardCaller:
    """The reward functions of a run. One that takes unusually long is named in the log.

    Args:
        functions: one or several; one with an attribute ``whose`` is called that in messages.
        weights: a number for each; default 1.
        timeout: seconds that a call of one may take, and asynchronous ones together; default: as long as it takes.
        alone: whether nothing else gives rewards. Otherwise there may be no function, and none need apply.
        loop: where asynchronous functions run: that of tools and environments where there are some, so that clients
            which belong to a loop keep theirs. Default: one of its own.

    Attributes:
        functions: the functions. names: what each is called in metrics: its ``__name__``, numbered where two are equal.
        weights: ``[F]`` float64.

    Raises UsageError if there is no function, one is none, or the weights do not fit.
    """

    def __init__(
        self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None,
        timeout: float | None = None, *, alone: bool = True, loop: EventLoop | None = None,
    ) -> None:  # fmt: skip
        given: list[Any] = [*functions] if isinstance(functions, list | tuple) else [functions]
        self._alone = alone
        if not given and alone:
            raise UsageError("reward_funcs is empty; give at least one reward function")
        for function in given:
            _check_function(function)
        self.functions: list[RewardFunction] = given
        self.names = _unique([_name(function) for function in given])
        self._said = [
            getattr(function, "whose", f"reward function {name!r}")
            for function, name in zip(given, self.names, strict=True)
        ]
        if weights is not None and len(weights) != len(given):
            raise UsageError(
                f"reward_weights has {len(weights)} numbers for {len(given)} reward functions "
                f"({', '.join(self.names)}); give one for each"
            )
        self.weights = torch.tensor([1.0] * len(given) if weights is None else list(weights), dtype=torch.float64)
        if not bool(torch.isfinite(self.weights).all()):
            raise UsageError(f"reward_weights must be finite numbers, got {list(weights or ())}")
        if alone and not bool(self.weights.any()):  # else functions may be there to be watched
            raise UsageError(
                f"reward_weights={list(weights or ())}: with every weight 0 all rewards are equal and nothing is "
                "learned; give at least one function a weight other than 0, or leave reward_weights out"
            )
        self._timeout = timeout
        advice = "" if timeout is not None else "; set reward_timeout, in seconds, to end a run that waits for it"
        self._watches = [Watch(said, advice=advice) for said in self._said]
        self._loop = EventLoop() if loop is None else loop

    def __call__(
        self,
        rows: Sequence[Prompt],
        completions: Sequence[str | list[dict[str, Any]]],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: Any = None,
        environments: Sequence[Any] | None = None,
    ) -> Rewards:
        """Rewards of N completions; `rows` holds the prompt of each, so a group's prompt G times.

        A text that completes messages is handed over as a list of one assistant message. What an episode of several
        turns said is a list of messages already, or text. ``environments`` are what it was played with.

        Raises UsageError if a function asks for what there is not, or none applies to a completion; TrainingError if
        one fails or returns anything but one finite number or None per completion.
        """
        log = _Log()
        offered = {
            **columns_of(rows),
            "prompts": [row.prompt for row in rows],
            "completions": [
                row.completion(said) if isinstance(said, str) else said
                for row, said in zip(rows, completions, strict=True)
            ],
            "completion_ids": [list(ids) for ids in completion_ids],
            "trainer_state": trainer_state,
            "log_extra": log.extra,
            "log_metric": log.metric,
        }
        if environments is not None:
            offered["environments"] = list(environments)
        with torch_defaults():
            returned = self._run(offered)
        columns = [numbers_of(output, said, rows) for said, output in zip(self._said, returned, strict=True)]
        values = torch.tensor(columns, dtype=torch.float64).reshape(len(columns), len(rows)).T.contiguous()
        unscored = torch.isnan(values).all(dim=1).nonzero()
        if unscored.numel() and self._alone:
            said = (getattr(f, "whose", name) for f, name in zip(self.functions, self.names, strict=True))
            raise UsageError(
                f"no reward function applies to {completion(int(unscored[0]), rows)}: {', '.join(said)} returned "
                "None; return a number for every completion from at least one of them"
            )
        return Rewards(values, self.names, log.columns(len(rows)), log.means())

    def check_columns(self, columns: Sequence[str], dataset: str, *, environments: bool) -> set[str]:
        """The columns that functions are given.

        Raises UsageError if a function asks for what it would not be given, or cannot be given what it would be.

        Args:
            columns: of ``dataset``, which is what it is called. environments: whether there are any.
        """
        check_names(columns, dataset)
        given = [name for name in RESERVED if environments or name != "environments"]
        offered: dict[str, Any] = dict.fromkeys((*columns, *given), ())
        read: set[str] = set()
        for function, name in zip(self.functions, self.names, strict=True):
            read |= arguments_for(function, name, offered, dataset).keys()
        return read & {*columns}

    def _run(self, offered: Mapping[str, Any]) -> list[Any]:
        arguments = [
            arguments_for(function, name, offered) for function, name in zip(self.functions, self.names, strict=True)
        ]
        outputs: list[Any] = [None] * len(arguments)
        waiting: dict[int, Awaitable[Any]] = {}
        try:
            # The plain ones first: an asynchronous one starts only when it is awaited.
            for i, function in enumerate(self.functions):
                outputs[i] = self._call(i, functools.partial(function, **arguments[i]))
                if inspect.isawaitable(outputs[i]):
                    waiting[i] = outputs[i]
        except BaseException:
            for awaitable in waiting.values():
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
            raise
        if waiting:
            returned = self._loop.gather({self._watches[i]: waiting[i] for i in waiting}, self._timeout)
            for i, output in zip(waiting, returned, strict=True):
                if isinstance(output, Late):
                    raise self._late(i)
                if isinstance(output, GrouprlError | KeyboardInterrupt):
                    raise output
                if isinstance(output, BaseException):
                    raise _failed(self._said[i], output) from output
                outputs[i] = output
        return outputs

    def _call(self, i: int, call: Callable[[], Any]) -> Any:
        def guarded() -> Any:
            try:
                return call()
            except (GrouprlError, KeyboardInterrupt, Expired):  # the first says what is wrong already
                raise
            except BaseException as error:  # sys.exit too
                raise _failed(self._said[i], error) from error

        with self._watches[i]:
            try:
                return within(self._timeout, guarded, name=self._said[i])
            except TimeoutError as error:
                raise self._late(i) from error

    def _late(self, i: int) -> TrainingError:
        return TrainingError(
            f"{self._said[i]} had not returned after {self._timeout:g} s, which reward_timeout "
            "allows; raise reward_timeout, or let the function give up by itself and return None"
        )


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
        if not str(name).isprintable() or not str(name).strip():
            raise TrainingError(f"log_metric({shown(name)}, ...): give a name of printable text")
        number = plain_float(value)
        if number is None or math.isinf(number):
            raise TrainingError(f"log_metric({name!r}, {shown(value)}): give a finite number")
        values = self._metrics.setdefault(str(name), [])
        if not math.isnan(number):
            values.append(number)

    def columns(self, n: int) -> dict[str, list[Any]]:
        for column, values in self._columns.items():
            if len(values) != n:
                raise TrainingError(
                    f"log_extra({column!r}, ...) was given {len(values)} values for {n} completions; give one for each"
                )
        return self._columns

    def means(self) -> dict[str, float]:
        return {name: math.fsum(values) / len(values) for name, values in self._metrics.items() if values}


def _check_function(function: Any) -> None:
    if isinstance(function, str | nn.Module):
        what = repr(function) if isinstance(function, str) else f"a {type(function).__name__}"
        raise UsageError(f"reward_funcs holds {what}; give grouprl.lm.rewards.model.RewardModel(...) of it")
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
    name = str(getattr(function, "__name__", type(function).__name__)).strip("<>")
    return "".join(c if c.isprintable() else "_" for c in name) or "reward"


def _unique(names: list[str]) -> tuple[str, ...]:
    unique: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return tuple(unique)


def _failed(whose: str, error: BaseException) -> TrainingError:
    return TrainingError(
        f"{whose} raised {error_text(error)}; let it return 0.0, or None where it does not apply, for "
        "completions it cannot judge"
    )

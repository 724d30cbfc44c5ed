"""What a sweep tries: settings with several values, or with a range."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grouprl.errors import UsageError, shown
from grouprl.reading import parse_yaml, with_numbers
from grouprl.settings.names import ALIASES

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Settings = dict[str, Any]

_RANGE = re.compile(r"\s*([-+.\deE]+?)\s*\.\.\s*([-+.\deE]+)\s*")
_LOGARITHMIC = 10
"""A range of positive numbers is searched by their logarithms if its ends differ by this factor."""


@dataclass(frozen=True)
class Space:
    """Settings by name: those that stay, those with several values, and those with a range (its two ends)."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, object]) -> Space:
        """From values: a list has several, text such as ``1e-4..1e-2`` is a range, anything else stays.

        Names that settings have elsewhere, such as ``lr``, are taken for ours. Raises UsageError for what is neither.
        """
        fixed: Settings = {}
        choices: dict[str, list[Any]] = {}
        ranges: dict[str, tuple[float, float]] = {}
        for name, value in given.items():
            name = ALIASES.get(name, name)
            if name in (*fixed, *choices, *ranges):
                raise UsageError(f"the setting {name!r} is given twice")
            if isinstance(value, str) and "," in value:  # the command line's are a list by now
                raise UsageError(f"{name}={shown(value)} is text; write several values as a list: {name}: [{value}]")
            if isinstance(value, str) and ".." in value:
                ranges[name] = _ends(name, value)
            elif isinstance(value, list) and len(value) > 1:
                choices[name] = with_numbers(value)
                if len({json.dumps(one, sort_keys=True, default=str) for one in choices[name]}) < len(value):
                    raise UsageError(f"{name}={shown(value)} has a value twice")
            else:
                fixed[name] = with_numbers(value[0] if isinstance(value, list) and value else value)
        return cls(fixed, choices, ranges)

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> dict[str, object]:
        """``["epsilon=0.1,0.2", "gamma=0.9..0.999"]`` as values for :meth:`read`. Raises UsageError for other text."""
        values: dict[str, object] = {}
        for pair in pairs:
            name, sign, text = pair.partition("=")
            if not sign or not name.strip() or not text.strip():
                raise UsageError(
                    f"cannot read {pair!r}; write KEY=VALUE,VALUE or KEY=LOW..HIGH, such as epsilon=0.1,0.2"
                )
            name = name.strip()
            if name in values:
                raise UsageError(f"the setting {name!r} is given twice; write its values as {name}=A,B")
            values[name] = text.strip() if _RANGE.fullmatch(text) else parse_yaml(f"[{text}]", f"the values of {name}")
        return values

    @property
    def varied(self) -> list[str]:
        """Names of the settings that are not the same in every trial."""
        return [*self.choices, *self.ranges]

    def grid(self) -> list[Settings]:
        """Every combination of the choices. Raises UsageError if there is a range."""
        if self.ranges:
            name = next(iter(self.ranges))
            raise UsageError(f"a grid needs values, and {name} has a range; give values, or --sampler tpe or random")
        return [dict(zip(self.choices, values, strict=True)) for values in itertools.product(*self.choices.values())]

    def corners(self) -> list[Settings]:
        """Settings to try whether they are allowed: each value of the choices and each end of the ranges."""
        first = {name: values[0] for name, values in (*self.choices.items(), *self.ranges.items())}
        every = [(name, value) for name, values in (*self.choices.items(), *self.ranges.items()) for value in values]
        return [first | {name: value} for name, value in every] or [{}]

    def distributions(self) -> dict[str, BaseDistribution]:
        """As Optuna has them. A choice is the text of a value, which it may be of any type."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {n: CategoricalDistribution(_texts(v)) for n, v in self.choices.items()}
        for name, (low, high) in self.ranges.items():
            log = _logarithmic(low, high)
            whole = isinstance(low, int) and isinstance(high, int)
            found[name] = IntDistribution(int(low), int(high), log) if whole else FloatDistribution(low, high, log)
        return found

    def as_text(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as Optuna has them."""
        return {n: _text(value) if n in self.choices else value for n, value in settings.items()}

    def of_text(self, params: Mapping[str, Any]) -> Settings:
        """Settings from what Optuna has; those of a range with few digits, so that a label can say all of them."""
        own = {name: dict(zip(_texts(values), values, strict=True)) for name, values in self.choices.items()}
        return {n: own[n][v] if n in own else _with_few_digits(v, *self.ranges[n]) for n, v in params.items()}

    def label(self, settings: Mapping[str, Any]) -> str:
        """A trial's settings in a line, each as `--set` reads it: settings that differ never have the same label."""
        return ", ".join(f"{name}={_said(settings[name])}" for name in self.varied) or "as it is"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _texts(values: Sequence[Any]) -> list[str]:
    return [_text(value) for value in values]


def _said(value: Any) -> str:
    """The shortest text that YAML reads as exactly this value, and that ends where a label goes on."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and not re.search(r"[,=]", value):
        with suppress(UsageError):
            if with_numbers(parse_yaml(value, "a value")) == value:
                return value
    return _text(value)


def _logarithmic(low: float, high: float) -> bool:
    """Whether a range is searched by the logarithms of its numbers."""
    return low > 0 and high / low >= _LOGARITHMIC


def _with_few_digits(value: float, low: float, high: float) -> float:
    """A number of a range as people would write it: to four digits, or to a ten-thousandth of a linear range."""
    if isinstance(value, int):
        return value
    few = float(f"{value:.4g}") if _logarithmic(low, high) else round(value, 4 - math.floor(math.log10(high - low)))
    return min(max(few, low), high)


def _ends(name: str, text: str) -> tuple[float, float]:
    found = _RANGE.fullmatch(text)
    try:
        assert found is not None
        low, high = (with_numbers(parse_yaml(end, "an end")) for end in found.groups())
        if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
            return low, high
    except (AssertionError, UsageError):
        pass
    raise UsageError(f"{name}={shown(text)} is no range; write two numbers, the lower one first: 1e-4..1e-2")

"""What a row must hold of a run that is done, for tables and figures: checked where it is made and where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Point(_Part):
    step: float
    greedy: float | None = None


class _Played(_Part):
    mean: FiniteFloat


class _Machine(_Part):
    processor: str
    cores: int


class _Done(_Part):
    greedy: _Played
    sampled: _Played | None = None
    curve: list[_Point] = []
    steps_done: float | None = None
    train_seconds: float | None = None
    train_cpu_seconds: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_mb: float | None = None
    versions: dict[str, str] | None = None
    warnings: list[str] = []
    machine: _Machine = _Machine(processor="", cores=0)


def problem(row: Mapping[str, Any]) -> str | None:
    """Why a run that is done cannot stand in a table, as ``sampled.mean: Field required``; None if it can."""
    try:
        _Done.model_validate(dict(row))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None

"""From a run folder to its diagnoses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from grouprl.doctor import environments, language
from grouprl.doctor.signs import first_of
from grouprl.doctor.table import Diagnosis, Rule, Table
from grouprl.errors import UsageError
from grouprl.runs.folder import RunFolder
from grouprl.runs.metrics import read_metrics


def examine(path: str | os.PathLike[str]) -> list[Diagnosis]:
    """What is wrong with the run in ``path``, finished or not; an empty list where no rule speaks.

    Raises UsageError: there is no run, or it has no metrics yet, or a file of it is damaged.
    """
    folder = RunFolder.open(path)
    config = folder.read_config()
    columns = read_metrics(folder.metrics_path)
    if not len(next(iter(columns.values()), ())):
        raise UsageError(f"{folder.path} has no metrics yet: there is nothing to examine")
    settings = config.get("config")
    known = settings if isinstance(settings, Mapping) else {}
    table = Table(columns, known, goal_of(folder), _progress(config, columns))
    return examine_table(table, is_language(config))


def examine_table(table: Table, language_model: bool) -> list[Diagnosis]:
    """All diagnoses of a table of metrics; ``language_model`` says of which arena it is."""
    return _apply(language.RULES if language_model else environments.RULES, table)


def examine_running(table: Table, language_model: bool) -> list[Diagnosis]:
    """Those that can be made of a run that goes on."""
    return _apply(language.WHILE_RUNNING if language_model else environments.WHILE_RUNNING, table)


def _apply(rules: Sequence[Rule], table: Table) -> list[Diagnosis]:
    return first_of([rule(table) for rule in rules])


def _progress(config: Mapping[str, Any], columns: Mapping[str, Any]) -> float:
    """The share of the planned steps that is done; 1 where nobody says how many are planned."""
    part, name = ("config", "max_steps") if is_language(config) else ("run", "total_timesteps")
    settings = config.get(part)
    planned = settings.get(name) if isinstance(settings, Mapping) else None
    if not isinstance(planned, int | float) or planned <= 0 or "step" not in columns:
        return 1.0
    return float(min(1.0, columns["step"][-1] / planned))


def is_language(config: Mapping[str, Any]) -> bool:
    """Whether a run's config.yaml is that of a language model."""
    return config.get("arena") == "lm"


def goal_of(folder: RunFolder) -> float | None:
    """The return at which the environment counts as solved, as config.yaml says."""
    goal = folder.read_config().get("reward_threshold")
    try:
        return None if goal is None else float(goal)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{folder.path} names no return that is a number as its reward_threshold ({error})") from None


def to_text(diagnoses: Sequence[Diagnosis]) -> str:
    """Each diagnosis for a person to read: its name, what was seen, and what to try."""
    if not diagnoses:
        return "healthy: no rule found anything wrong"
    return "\n".join(
        f"{'ill' if one.ill else 'note'}: {one.name}\n  {one.finding}.\n  Try: {one.advice}" for one in diagnoses
    )

"""Trackers of other libraries, by transformers' own callbacks, and the rows of a table of completions."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from grouprl.errors import UsageError, first_line
from grouprl.lm.generate.samples import Samples
from grouprl.lm.messages import conversation_text
from grouprl.lm.settings.trackers import OWN_TRACKERS
from grouprl.lm.train.transcripts import transcripts_of


def tracker_callbacks(names: Sequence[str]) -> list[Any]:
    """transformers' callbacks for the trackers among ``names`` that are not grouprl's own.

    Raises UsageError if the package of one is not installed, or cannot be used.
    """
    made = []
    for name in names:
        if name in OWN_TRACKERS:
            continue
        callbacks = import_module("transformers.integrations.integration_utils").INTEGRATION_TO_CALLBACK
        if name in ("mlflow", "dagshub"):  # whose __del__ asks for it, also of one that could not be made
            callbacks[name]._auto_end_run = False
        try:
            made.append(callbacks[name]())
        except Exception as error:  # of the tracker's package, or because it is missing
            raise UsageError(f"report_to={name!r} cannot be used: {first_line(error)}") from error
    return made


def table_of(samples: Samples, names: Sequence[str], step: int) -> tuple[list[str], list[list[Any]]]:
    """Names of columns and rows: TRL's columns, a row for each completion, or episode."""
    n = len(samples) if samples.turns is None else len(samples.turns.messages)
    extras = [name for name in samples.extras if name not in names]
    rows = [
        [
            step, _text(one.prompt), one.completion, *(one.rewards[name] for name in names),
            *(_plain(one.extra[name]) for name in extras), one.advantage,
        ]
        for one in transcripts_of(samples, names, step, n)
    ]  # fmt: skip
    return ["step", "prompt", "completion", *names, *extras, "advantage"], rows


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else conversation_text(prompt)


def _plain(value: Any) -> Any:
    """A value that a table can hold."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)

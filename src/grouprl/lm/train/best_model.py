"""Which model of a run is the best, by the number of its evaluations that the configuration names."""

from __future__ import annotations

import warnings
from math import isfinite
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.train.setup import Setup

Metrics = dict[str, float]


def note_evaluation(config: GRPOConfig, state: Any, metrics: Metrics) -> None:
    """Note the model as the best so far in transformers' ``state``, if the numbers of its evaluation say so.

    Raises UsageError if the number that decides is not among them.
    """
    decisive = config.metric_for_best_model
    if decisive is None:
        return
    name = decisive if decisive.startswith("eval_") else f"eval_{decisive}"
    if name not in metrics:
        raise UsageError(
            f"metric_for_best_model={decisive!r} is not among the numbers of an evaluation, which are "
            f"{', '.join(sorted(metrics))}"
        )
    value, best = metrics[name], state.best_metric
    if isfinite(value) and (best is None or (value > best if config.greater_is_better else value < best)):
        state.best_metric, state.best_global_step = value, state.global_step


def best_checkpoint(state: Any) -> Path | None:
    """The best model's checkpoint, if there is one."""
    path, step = state.best_model_checkpoint, state.best_global_step
    place = None if path is None else Path(path)
    return place if place is not None and place.name == f"checkpoint-{step}" and place.is_dir() else None


def find_moved(state: Any, output_dir: Path) -> None:
    """Look for the best model's checkpoint in ``output_dir`` if it is not where it was: a run's folder may be moved."""
    if state.best_model_checkpoint is not None and best_checkpoint(state) is None:
        here = output_dir / Path(state.best_model_checkpoint).name
        if here.is_dir():
            state.best_model_checkpoint = str(here)


def load_best(setup: Setup, state: Any) -> None:
    """Go back to the best model, or warn that it is in no checkpoint any more."""
    place = best_checkpoint(state)
    if place is not None:
        setup.load_weights(place)
    elif state.best_global_step is not None:
        warnings.warn(
            f"the best model, of step {state.best_global_step}, is in no checkpoint any more (it was "
            f"{state.best_model_checkpoint}); the last one is kept",
            stacklevel=2,
        )


def check_intervals(config: GRPOConfig, state: Any) -> None:
    """Raises UsageError if some model that is saved would not be evaluated, and the best is to be loaded."""
    if not config.load_best_model_at_end or config.eval_strategy != "steps":
        return
    every, saves = state.eval_steps, state.save_steps
    if saves % every:
        raise UsageError(
            f"load_best_model_at_end=True: in a run of {state.max_steps} steps models are saved every {saves} steps "
            f"and judged every {every}; set save_steps to a multiple of eval_steps"
        )

"""What a recipe trains on: rows of a task, of a file or of an environment's starts, and what rewards them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from grouprl.errors import UsageError, first_line, shown
from grouprl.importing import load_function
from grouprl.lm import tasks
from grouprl.lm.agents.environments import text_environment
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.tasks.jsonl import load_jsonl
from grouprl.lm.tasks.task import Task
from grouprl.runs.files import user_path

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskData:
    """What a recipe trains on.

    Attributes:
        train, held_out: rows for training and for evaluation.
        reward: the reward function, or None where the environment alone rewards.
        task: the task they are of, or None if they come from a file or an environment.
        environment: what makes the environment that is played, or None. tools: functions that the model may call.
    """

    train: Rows
    held_out: Rows
    reward: Any
    task: Task | None
    environment: Any = None
    tools: tuple[Callable[..., Any], ...] = ()


def load_task_data(recipe: Recipe) -> TaskData:
    """The rows and the reward of a recipe; the same every time.

    Raises UsageError for an unknown task, a file that cannot be used, or a missing reward.
    """
    if recipe.form not in ("messages", "text"):
        raise UsageError(f"form={recipe.form!r} is neither 'messages' nor 'text'")
    if recipe.environment is not None:
        data = _of_environment(recipe, recipe.environment)
    else:
        data = _of_file(recipe) if recipe.task.endswith(".jsonl") else _of_task(recipe)
    return replace(data, tools=tuple(load_function(tool) for tool in recipe.tools))


def _of_file(recipe: Recipe) -> TaskData:
    if recipe.reward is None:
        raise UsageError(f"{recipe.task} is a file, so reward must name a function: --set reward=module:function")
    rows, reward = load_jsonl(recipe.task), load_function(recipe.reward, user_path(recipe.task).parent)
    if recipe.eval_data is not None:
        return TaskData(rows, load_jsonl(recipe.eval_data), reward, None)
    n = min(recipe.n_eval, len(rows) // 5)
    if n < 1:
        raise UsageError(f"{recipe.task} has only {len(rows)} rows; give at least 5, or eval_data as a second file")
    return TaskData(rows[:-n], rows[-n:], reward, None)


def _of_task(recipe: Recipe) -> TaskData:
    task = tasks.get(recipe.task, **recipe.task_options)
    reward = task.reward if recipe.reward is None else load_function(recipe.reward)
    form: Any = recipe.form
    return TaskData(
        tasks.dataset(task, "train", recipe.n_train, form=form),
        tasks.dataset(task, "eval", recipe.n_eval, form=form), reward, task,
    )  # fmt: skip


_FUNCTIONS = ("obs_to_text", "action_parser", "state", "env_kwargs")
"""Options of an environment that are functions, or may be: a recipe names them."""


def _of_environment(recipe: Recipe, name: str) -> TaskData:
    """Its starts: even seeds to train on, odd ones held out."""
    reward = None if recipe.reward is None else load_function(recipe.reward)
    train = [{"seed": 2 * i} for i in range(recipe.n_train)]
    held_out = [{"seed": 2 * i + 1} for i in range(recipe.n_eval)]
    return TaskData(train, held_out, reward, None, _environment(name, recipe.environment_options))


def _environment(name: str, options: dict[str, Any]) -> Any:
    """What makes the environment. A class with ``begin`` or with tools in the place of ``step`` is that itself."""
    if ":" in name and name.rpartition(":")[2].isidentifier():
        made = load_function(name)
        if isinstance(made, type) and not hasattr(made, "step"):
            if options:
                raise UsageError(f"environment_options={shown(options)}: {name} is no text environment and takes none")
            return made
    loaded: dict[str, Any] = {
        key: load_function(value) if key in _FUNCTIONS and isinstance(value, str) else value
        for key, value in options.items()
    }
    try:
        return text_environment(name, **loaded)
    except TypeError as error:
        known = ", ".join(inspect.signature(text_environment).parameters)
        raise UsageError(f"environment_options: {first_line(error)}; known: {known}") from error

"""What a recipe trains on: rows of a task or of a file, and the function that rewards completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grouprl.errors import UsageError
from grouprl.importing import load_function
from grouprl.lm import tasks
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.tasks.jsonl import load_jsonl
from grouprl.lm.tasks.task import Task
from grouprl.runs.files import user_path

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskData:
    """Rows for training and for evaluation, the reward, and the task they are of; None if they come from a file."""

    train: Rows
    held_out: Rows
    reward: Any
    task: Task | None


def load_task_data(recipe: Recipe) -> TaskData:
    """The rows and the reward of a recipe; the same every time.

    Raises UsageError for an unknown task, a file that cannot be used, or a missing reward.
    """
    if recipe.form not in ("messages", "text"):
        raise UsageError(f"form={recipe.form!r} is neither 'messages' nor 'text'")
    return _of_file(recipe) if recipe.task.endswith(".jsonl") else _of_task(recipe)


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

"""What a run left, taken up again to be evaluated or watched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grouprl.lm.run import recipe as recipes
from grouprl.lm.run.data import TaskData, load_task_data
from grouprl.lm.run.models import hide_file_bars, load_trained
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.run.saved import settings_for_use
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.train.setup import Setup
from grouprl.lm.train.trainer import GRPOTrainer
from grouprl.runs import RunFolder


@dataclass(frozen=True)
class Trained:
    """A run's model with what it was trained on.

    Attributes:
        recipe, config, data: of the run. setup: with the model that it left, or that of its newest checkpoint.
    """

    recipe: Recipe
    config: GRPOConfig
    data: TaskData
    setup: Setup


def open_trained(path: str | os.PathLike[str], changes: Mapping[str, Any], **settings: Any) -> Trained:
    """Take up a run. Nothing of its folder changes.

    Args:
        changes: fields of its recipe to replace. settings: of its configuration.

    Raises UsageError if there is no such run, or it left no model yet.
    """
    folder = RunFolder.open(path)
    hide_file_bars()
    recipe = recipes.load(folder.path).with_secrets().changed(changes)
    config = settings_for_use(folder, output_dir=str(folder.path.absolute())).replace(
        eval_strategy="no", eval_on_start=False, load_best_model_at_end=False, metric_for_best_model=None,
        disable_tqdm=True, **settings,
    ).with_secrets().with_chosen(())  # fmt: skip
    data = load_task_data(recipe)
    model, tokenizer = load_trained(folder, recipe, config, data.task)
    setup = GRPOTrainer(
        model, data.reward, config, data.train, processing_class=tokenizer, environment_factory=data.environment,
        tools=list(data.tools) or None,
    ).setup  # fmt: skip
    return Trained(recipe, config, data, setup)

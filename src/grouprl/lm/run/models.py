"""The model of a recipe: as its training begins, and as a run left it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError
from grouprl.extras import how_to_install
from grouprl.lm.models.load import load
from grouprl.lm.models.restore import load_weights
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.tasks.task import Task
from grouprl.lm.train import checkpoint
from grouprl.runs import RunFolder
from grouprl.runs.manifest import check_manifest


def hide_file_bars() -> None:
    """Have transformers show no progress bars for files that are read or written in a second."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


def initial_model(recipe: Recipe, config: GRPOConfig, task: Task | None) -> tuple[Any, Any]:
    """What GRPOTrainer takes as model and tokenizer: a name and None, or a tiny model after its supervised start.

    Raises UsageError if ``warm_start`` does not go with the rest of the recipe.
    """
    if recipe.model != "tiny":
        if recipe.warm_start is not None:
            raise UsageError("warm_start is for model: tiny; a pre-trained model needs none")
        return recipe.model, None
    from grouprl.lm.models.tiny import build_tiny, warm_start

    model, tokenizer = build_tiny(config.seed)
    if recipe.warm_start is not None:
        if task is None or recipe.form != "text":
            raise UsageError("warm_start needs a task that ships and form: text")
        text, generate = task.text, task.generate

        def pair(rng: Any) -> tuple[str, str]:
            example = generate(rng, "train")
            return text(example), example.answer

        try:
            warm_start(model, tokenizer, pair, seed=config.seed, **recipe.warm_start)
        except TypeError as error:
            known = "it takes steps, learning_rate and accuracy"
            raise UsageError(f"warm_start={recipe.warm_start}: {error}; {known}") from error
    return model, tokenizer


def adapter(settings: Mapping[str, Any] | None) -> Any:
    """PEFT's LoraConfig of a recipe's ``lora``, or None. Raises UsageError for settings that it does not take."""
    if settings is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UsageError(f"lora needs PEFT; run: {how_to_install('lm')}") from error
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    except (TypeError, ValueError) as error:
        raise UsageError(f"lora: {error}; see peft.LoraConfig") from error


def load_trained(folder: RunFolder, recipe: Recipe, config: GRPOConfig, task: Task | None) -> tuple[Any, Any]:
    """The model a run left, or its newest checkpoint, and its tokenizer. Raises UsageError if there is neither."""
    place = trained_model(folder)
    with checkpoint.offering_another(place):
        check_manifest(place, all_files=False)
        return _load(place, recipe, config, task)


def _load(place: Path, recipe: Recipe, config: GRPOConfig, task: Task | None) -> tuple[Any, Any]:
    lora = adapter(recipe.lora)
    if lora is None or recipe.model != "tiny":
        return load(place, dtype=config.master_dtype)
    from peft import get_peft_model

    # What an adapter was trained on has no name here, but its seed makes it again.
    base, tokenizer = initial_model(recipe, config, task)
    model = get_peft_model(base, lora)
    load_weights(model, place)
    return model, tokenizer


def trained_model(folder: RunFolder) -> Path:
    """The model a run left, or its newest checkpoint. Raises UsageError if there is neither."""
    if folder.model_folder.is_dir():
        return folder.model_folder
    newest = checkpoint.latest(folder.path)
    if newest is None:
        raise UsageError(f"{folder.path} holds no model yet; `grouprl resume` goes on with it")
    return newest

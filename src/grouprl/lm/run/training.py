"""A run: train a language model by a recipe and leave a folder anyone understands. What train-lm and resume do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from grouprl.errors import TrainingError, UsageError
from grouprl.importing import load_function
from grouprl.lm.generate.scored_groups import ScoredGroups
from grouprl.lm.models.find import SMOLLM2
from grouprl.lm.run import recipe as recipes
from grouprl.lm.run.data import TaskData, load_task_data
from grouprl.lm.run.held_out import Evaluated, HeldOutEvaluation
from grouprl.lm.run.models import adapter, hide_file_bars, initial_model
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.run.report import leave_results
from grouprl.lm.run.saved import reading
from grouprl.lm.run.trained import open_trained
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.trackers import OWN_TRACKERS
from grouprl.lm.train import checkpoint
from grouprl.lm.train.evaluation import HeldOut, evaluate_greedily
from grouprl.lm.train.sinks import Recording
from grouprl.lm.train.trainer import GRPOTrainer
from grouprl.lm.train.transcripts import transcripts_of_evaluation
from grouprl.machine.busy import sleeping_when_busy
from grouprl.machine.ranks import Ranks, refuse_several_processes
from grouprl.runs import RunFolder
from grouprl.runs.files import user_path
from grouprl.runs.signals import stopping_on_signals
from grouprl.runs.state import read_meta, taking_up
from grouprl.runs.trackers import check_trackers
from grouprl.runs.transcripts import TranscriptWriter


@dataclass(frozen=True)
class RunResult:
    """What a finished (or interrupted) run left behind."""

    folder: RunFolder
    steps: int
    summary: dict[str, Any] | None
    notes: list[str]


@sleeping_when_busy()
def train(
    source: str | os.PathLike[str] | Recipe,
    out: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    steps: int | None = None,
    track: tuple[str, ...] | None = None,
    overwrite: bool = False,
    progress_bar: bool | None = None,
    announce: Callable[[RunFolder], None] | None = None,
    evaluated: Evaluated | None = None,
) -> RunResult:
    """Train by a recipe (a preset's name, a file, or a Recipe) and leave a run folder at ``out``.

    Args:
        settings: fields of the recipe, or of its configuration, to change. seed, steps: the most common two.
        track: ``tensorboard``, ``wandb`` or ``none``, instead of the recipe's ``report_to``.
        progress_bar: False leaves out the bar and the lines of logs; default: as ``disable_tqdm`` says.
        announce: called with the run folder once everything asked for is known to be possible.
        evaluated: is told of each evaluation on the held-out rows: the step, the seconds of training, the result.

    Raises:
        UsageError: something asked for is not possible; nothing is left behind.
        TrainingError: a reward function or the numbers failed; the last checkpoint stays and can be resumed. Nothing is
            left behind if no step was done.
    """
    hide_file_bars()
    changes = dict(settings or {})
    if track is not None:
        check_trackers(track)
        if "report_to" in changes:
            raise UsageError(
                f"report_to={changes['report_to']!r} and --track {' '.join(track)} both name the trackers; give one"
            )
        changes["report_to"] = list(track)
    if seed is not None:
        changes["seed"] = seed
    if steps is not None:
        changes["max_steps"] = steps
    recipe = source if isinstance(source, Recipe) else recipes.load(source)
    chosen = {*changes, *(() if source in recipes.names() else recipe.config)}
    recipe = recipe.changed(changes)
    ranks = _settings({**_defaults(recipe), **recipe.config}, out, progress_bar).join()
    with ranks.telling():
        out = ranks.once(lambda: str(user_path(out).absolute()))
        ranks.once(lambda: RunFolder(Path(out)).check_free(overwrite))
        if "output_dir" in recipe.config:
            raise UsageError(
                f"output_dir={recipe.config['output_dir']!r}: --out names the folder of a run; leave it out"
            )
        with RunFolder(Path(out)).locked() if ranks.first else nullcontext():
            return _train(recipe, out, overwrite, progress_bar, announce, evaluated, ranks, chosen)


def _train(
    recipe: Recipe, out: str | os.PathLike[str], overwrite: bool, progress_bar: bool | None,
    announce: Callable[[RunFolder], None] | None, evaluated: Evaluated | None, ranks: Ranks, chosen: set[str],
) -> RunResult:  # fmt: skip
    told = chosen - {"transcripts"}  # a run by a recipe writes them of each generation
    config = _settings({**_defaults(recipe), **recipe.config}, out, progress_bar).with_chosen(told)
    check_trackers([name for name in config.report_to if name in OWN_TRACKERS])
    data = load_task_data(recipe)
    trainer = build(recipe, config, data)
    described = recipe.changed({"seed": config.seed}).to_dict() | _absolute(recipe)
    about = {
        "grouprl": version("grouprl"), "arena": "lm", "task": recipe.subject, "seed": config.seed,
        "recipe": described, "config": config.replace(output_dir=None).to_dict(),
    }  # fmt: skip
    folder = RunFolder(ranks.once(lambda: RunFolder.create(out, about, overwrite=overwrite).path))
    if announce is not None and ranks.first:
        announce(folder)
    with folder.kept_in_order() if ranks.first else nullcontext():
        return _run(folder, recipe, trainer, data, progress_bar, resume=False, evaluated=evaluated)


@sleeping_when_busy()
def resume(path: str | os.PathLike[str], *, steps: int | None = None, progress_bar: bool | None = None) -> RunResult:
    """Go on with an interrupted run, from its newest checkpoint, exactly as if it had not stopped.

    A run that was stopped after its last step and before it left its summary is finished.

    Args:
        steps: a new total, to make a finished run longer. progress_bar: as in :func:`train`.

    Raises UsageError: no run folder, no checkpoint, a run that is already finished or that another process works on.
    """
    folder = RunFolder.open(path)
    hide_file_bars()
    ranks = _settings_of(folder, progress_bar)[1].join()
    with ranks.telling(), folder.locked() if ranks.first else nullcontext():
        return _resume(folder, steps, progress_bar, ranks)


def _settings_of(folder: RunFolder, progress_bar: bool | None) -> tuple[Recipe, GRPOConfig]:
    saved = folder.read_config()
    with reading(folder):
        recipe = Recipe(**{"name": folder.path.name, **saved["recipe"]}).with_secrets()
        return recipe, _settings(saved["config"], folder.path, progress_bar).with_secrets().with_chosen(())


def _resume(folder: RunFolder, steps: int | None, progress_bar: bool | None, ranks: Ranks) -> RunResult:
    saved = folder.read_config()
    recipe, config = _settings_of(folder, progress_bar)
    if steps is not None:
        config = config.replace(max_steps=steps)
    newest = ranks.once(lambda: checkpoint.latest(folder.path))
    if newest is None:
        useless = ", ".join(path.name for path in checkpoint.existing(folder.path))
        content = f"only {useless}, which cannot be resumed from" if useless else "no checkpoint"
        raise UsageError(f"{folder.path} holds {content}, so there is nothing to resume; train anew with another --out")
    done = int(newest.name.rpartition("-")[2])
    if folder.is_finished() and (total := _total(config, newest)) is not None and total <= done:
        raise UsageError(f"{folder.path} has done all of its {done} steps; give a larger total with --steps")
    data = load_task_data(recipe)
    # The checkpoint has the warm weights, unless it holds an adapter alone; a reference begins with them too.
    warm = recipe.lora is not None or config.beta > 0
    trainer = build(recipe if warm else recipe.changed({"warm_start": None}), config, data)
    ranks.once(lambda: folder.reopen(None if steps is None else _lengthened(saved, steps)))
    return _run(folder, recipe, trainer, data, progress_bar, resume=True)


def _total(config: GRPOConfig, newest: Path) -> int | None:
    """The steps of a run: a checkpoint knows how many its epochs are. None if they are others now."""
    if config.max_steps > 0:
        return config.max_steps
    with taking_up(newest / checkpoint.STATE):
        meta = read_meta(newest / checkpoint.STATE)
        same = meta["config"]["num_train_epochs"] == config.num_train_epochs and meta["config"]["max_steps"] <= 0
        return int(meta["book"]["state"]["max_steps"]) if same else None


def _lengthened(saved: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The config.yaml of a run that shall do so many steps."""
    recipe = {**saved["recipe"], "config": {**saved["recipe"].get("config", {}), "max_steps": steps}}
    return {**saved, "recipe": recipe, "config": {**saved["config"], "max_steps": steps}}


def build(recipe: Recipe, config: GRPOConfig, data: TaskData) -> GRPOTrainer:
    """The trainer of a recipe. Raises UsageError for whatever cannot work."""
    model, tokenizer = initial_model(recipe, config, data.task)
    sampled = config.eval_strategy != "no" or config.eval_on_start
    return GRPOTrainer(
        model, data.reward, config, data.train, data.held_out if sampled else None, processing_class=tokenizer,
        environment_factory=data.environment, tools=list(data.tools) or None, peft_config=adapter(recipe.lora),
        advantage_function=_function(recipe.advantage_function),
        surrogate_function=_function(recipe.surrogate_function),
    )  # fmt: skip


def _function(name: str | None) -> Any:
    return None if name is None else load_function(name)


def _absolute(recipe: Recipe) -> dict[str, str]:
    """The recipe's files and folders, found from wherever the run is resumed or evaluated."""
    files = {name: file for name in ("task", "eval_data") if (file := getattr(recipe, name) or "").endswith(".jsonl")}
    # tiny and smollm2 are no folders, whatever is there
    if recipe.model not in ("tiny", SMOLLM2) and user_path(recipe.model).exists():
        files["model"] = recipe.model
    return {name: str(user_path(file).absolute()) for name, file in files.items()}


def _defaults(recipe: Recipe) -> dict[str, Any]:
    """What a run by a recipe sets where the recipe does not: trackers show each step, transcripts are kept."""
    every = recipe.eval_every or GRPOConfig.model_fields["logging_steps"].default
    return {"transcripts": 16, "logging_steps": 1, "eval_steps": every}


def _settings(values: Mapping[str, Any], out: str | os.PathLike[str], progress_bar: bool | None) -> GRPOConfig:
    bar = {} if progress_bar is None else {"disable_tqdm": not progress_bar}
    return GRPOConfig(**{**values, **bar, "output_dir": str(user_path(out).absolute())})


_LOGGING = ("logging_strategy", "logging_steps", "logging_first_step")


def _recording(folder: RunFolder, recipe: Recipe, progress_bar: bool | None) -> Recording:
    """What a run by a recipe records: every step, every generation, and logs as lines if it says when to log."""
    lines = progress_bar is not False and any(name in recipe.config for name in _LOGGING)
    return Recording(
        metrics_path=folder.metrics_path, each_generation=True, lines=lines, sampled_as="eval_sampled_",
        about=folder.read_config(),
    )  # fmt: skip


def _run(
    folder: RunFolder, recipe: Recipe, trainer: GRPOTrainer, data: TaskData, progress_bar: bool | None,
    resume: bool, evaluated: Evaluated | None = None,
) -> RunResult:  # fmt: skip
    book = trainer.book
    book.recording = _recording(folder, recipe, progress_bar)
    prompts = trainer.prompts(data.held_out, "the held-out rows")
    held_out = HeldOutEvaluation(trainer.setup, book, prompts, folder, recipe.eval_every, evaluated)
    trainer.add_callback(held_out)

    def stop() -> None:
        held_out.stop_requested = True

    with stopping_on_signals(stop):
        try:
            trainer.train(resume_from_checkpoint=resume)
        except TrainingError as error:
            if not trainer.policy.ranks.first:
                raise
            last = checkpoint.latest(folder.path)
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint"
            raise TrainingError(f"{error} (after {trainer.state.global_step} steps; {kept}).") from error
    if held_out.after is None:
        return RunResult(folder, trainer.state.global_step, None, [])
    after = held_out.after
    trainer.save_model(folder.model_folder)
    summary, notes = trainer.policy.ranks.once(lambda: leave_results(folder, recipe, trainer, after))
    return RunResult(folder, trainer.state.global_step, summary, notes)


@sleeping_when_busy()
def evaluate(
    path: str | os.PathLike[str], n: int | None = None, answers: str | os.PathLike[str] | None = None
) -> HeldOut:
    """Greedy performance of a run's model on its held-out rows; a larger ``n`` draws more of them.

    Args:
        answers: a new file for what it said and what it got for it, as JSON lines.

    Raises UsageError if there is no such run, it left no model yet, or the file exists.
    """
    refuse_several_processes("an evaluation")
    if answers is not None and user_path(answers).exists():
        raise UsageError(f"{answers} exists; name another file for the answers")
    if n is not None and n < 1:
        raise UsageError(f"cannot evaluate on {n} held-out prompts or starts; ask for at least 1")
    of_file = RunFolder.open(path).read_config().get("recipe", {}).get("task", "").endswith(".jsonl")
    trained = open_trained(path, {} if n is None or of_file else {"n_eval": n})
    setup = trained.setup
    prompts = setup.read(trained.data.held_out, "the held-out rows")
    torch.manual_seed(trained.config.seed)
    assert prompts.size is not None
    with nullcontext() if answers is None else TranscriptWriter(answers) as writer:

        def keep(drawn: ScoredGroups) -> None:
            if writer is not None:
                writer.append(transcripts_of_evaluation(drawn, setup.eval_player.names))

        return evaluate_greedily(setup, prompts, n, keep=keep)

"""A run: train a language model by a recipe and leave a folder anyone understands. What train-lm and resume do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from grouprl.errors import TrainingError, UsageError
from grouprl.lm import tasks
from grouprl.lm.models.find import SMOLLM2
from grouprl.lm.models.load import load
from grouprl.lm.models.save import load_weights
from grouprl.lm.run import recipe
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.run.recorder import HeldOut, Recorder, evaluate_greedily, peak_memory_gb
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.tasks.jsonl import load_function, load_jsonl
from grouprl.lm.tasks.task import Task
from grouprl.lm.train import checkpoint
from grouprl.lm.train.trainer import GRPOTrainer
from grouprl.lm.train.transcripts import TranscriptWriter, write_html
from grouprl.runs import RunFolder
from grouprl.runs.signals import stopping_on_signals
from grouprl.runs.trackers import check_trackers

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RunResult:
    """What a finished (or interrupted) run left behind."""

    folder: RunFolder
    steps: int
    summary: dict[str, Any] | None
    notes: list[str]


@dataclass(frozen=True)
class Material:
    """What a recipe trains on: rows for training and for evaluation, and the reward."""

    train: Rows
    held_out: Rows
    reward: Any
    task: Task | None


def material(given: Recipe) -> Material:
    """The rows and the reward of a recipe; the same every time.

    Raises UsageError for an unknown task, a file that cannot be used, or a missing reward.
    """
    if given.form not in ("messages", "text"):
        raise UsageError(f"form={given.form!r} is neither 'messages' nor 'text'")
    if given.task.endswith(".jsonl"):
        if given.reward is None:
            raise UsageError(f"{given.task} is a file, so reward must name a function: --set reward=module:function")
        rows, reward = load_jsonl(given.task), load_function(given.reward, Path(given.task).parent)
        if given.eval_data is not None:
            return Material(rows, load_jsonl(given.eval_data), reward, None)
        n = min(given.n_eval, len(rows) // 5)
        if n < 1:
            raise UsageError(f"{given.task} has only {len(rows)} rows; give at least 5, or eval_data as a second file")
        return Material(rows[:-n], rows[-n:], reward, None)
    task = tasks.get(given.task, **given.task_options)
    reward = task.reward if given.reward is None else load_function(given.reward)
    form: Any = given.form
    return Material(
        tasks.dataset(task, "train", given.n_train, form=form), tasks.dataset(task, "eval", given.n_eval, form=form),
        reward, task,
    )  # fmt: skip


def build(given: Recipe, config: GRPOConfig, rows: Material, callbacks: list[Any] | None = None) -> GRPOTrainer:
    """The trainer of a recipe. Raises UsageError for whatever cannot work."""
    model, tokenizer = _model(given, config, rows.task)
    return GRPOTrainer(
        model, rows.reward, config, rows.train, processing_class=tokenizer, callbacks=callbacks,
        peft_config=_adapter(given.lora), advantage_function=_function(given.advantage_function),
        surrogate_function=_function(given.surrogate_function),
    )  # fmt: skip


def _function(name: str | None) -> Any:
    return None if name is None else load_function(name)


def _model(given: Recipe, config: GRPOConfig, task: Task | None) -> tuple[Any, Any]:
    if given.model != "tiny":
        if given.warm_start is not None:
            raise UsageError("warm_start is for model: tiny; a pre-trained model needs none")
        return given.model, None
    from grouprl.lm.models.tiny import build_tiny, warm_start

    model, tokenizer = build_tiny(config.seed)
    if given.warm_start is not None:
        if task is None or given.form != "text":
            raise UsageError("warm_start needs a task that ships and form: text")
        known = task

        def pair(rng: Any) -> tuple[str, str]:
            example = known.generate(rng, "train")
            return known.text(example), example.answer

        try:
            warm_start(model, tokenizer, pair, seed=config.seed, **given.warm_start)
        except TypeError as error:
            raise UsageError(f"warm_start={given.warm_start}: {error}; it takes steps and learning_rate") from error
    return model, tokenizer


def _adapter(settings: Mapping[str, Any] | None) -> Any:
    if settings is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UsageError("lora needs PEFT: pip install 'grouprl[lm]'") from error
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    except (TypeError, ValueError) as error:
        raise UsageError(f"lora: {error}; see peft.LoraConfig") from error


def train(
    source: str | os.PathLike[str] | Recipe,
    out: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    steps: int | None = None,
    track: tuple[str, ...] = ("tensorboard",),
    overwrite: bool = False,
    progress_bar: bool | None = None,
    announce: Callable[[RunFolder], None] | None = None,
) -> RunResult:
    """Train by a recipe (a preset's name, a file, or a Recipe) and leave a run folder at ``out``.

    Args:
        settings: fields of the recipe, or of its configuration, to change. seed, steps: the most common two.
        track: ``tensorboard``, ``wandb`` or ``none``.
        announce: called with the run folder once everything asked for is known to be possible.

    Raises:
        UsageError: something asked for is not possible; nothing is left behind.
        TrainingError: a reward function or the numbers failed; the last checkpoint stays and can be resumed. Nothing is
            left behind if no step was done.
    """
    check_trackers(track)
    quiet()
    given = source if isinstance(source, Recipe) else recipe.load(source)
    changes = dict(settings or {})
    if seed is not None:
        changes["seed"] = seed
    if steps is not None:
        changes["max_steps"] = steps
    given = given.changed(changes)
    RunFolder(Path(out)).check_free(overwrite)
    _check_settings(given)
    config = GRPOConfig(**{"transcripts": 16, **given.config, **_of_a_run(out, progress_bar)})
    rows = material(given)
    trainer = build(given, config, rows)
    described = given.to_dict() | {"config": {**given.config, "seed": config.seed}} | _absolute(given)
    folder = RunFolder.create(
        out,
        {"grouprl": version("grouprl"), "arena": "lm", "task": given.task, "seed": config.seed, "track": list(track),
         "recipe": described, "config": config.replace(output_dir=None).to_dict()},
        overwrite=overwrite,
    )  # fmt: skip
    if announce is not None:
        announce(folder)
    with folder.kept_in_order():
        return _run(folder, given, trainer, rows, track, resume_from=None)


def resume(path: str | os.PathLike[str], *, steps: int | None = None, progress_bar: bool | None = None) -> RunResult:
    """Go on with an interrupted run, from its newest checkpoint, exactly as if it had not stopped.

    Args:
        steps: a new total, to make a finished run longer.

    Raises UsageError: no run folder, no checkpoint, or a run that is already finished.
    """
    folder = RunFolder.open(path)
    quiet()
    saved = folder.read_config()
    try:
        given = Recipe(**{"name": folder.path.name, **saved["recipe"]})
        track = tuple(saved["track"])
        config = GRPOConfig(**{**saved["config"], **_of_a_run(folder.path, progress_bar)})
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder.config_path} is not the configuration of a language-model run ({error})") from None
    newest = checkpoint.latest(folder.path)
    if newest is None:
        useless = ", ".join(path.name for path in checkpoint.existing(folder.path))
        found = f"only {useless}, without a state that can be read" if useless else "no checkpoint"
        raise UsageError(f"{folder.path} holds {found}, so there is nothing to resume; train anew with another --out")
    done = int(newest.name.rpartition("-")[2])
    if steps is not None:
        config = config.replace(max_steps=steps)
    if config.max_steps > 0 and done >= config.max_steps:
        raise UsageError(f"{folder.path} has done all of its {done} steps; give a larger total with --steps")
    rows = material(given)
    # The checkpoint has the warm weights, unless it holds an adapter alone; a reference begins with them too.
    cold = given if given.lora is not None or config.beta > 0 else Recipe(**{**given.__dict__, "warm_start": None})
    trainer = build(cold, config, rows)
    return _run(folder, given, trainer, rows, track, resume_from=newest)


def quiet() -> None:
    """No bars for reading and writing files of a second."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


def _absolute(given: Recipe) -> dict[str, str]:
    """The recipe's files and folders, found from wherever the run is resumed or evaluated."""
    files = {name: file for name in ("task", "eval_data") if (file := getattr(given, name) or "").endswith(".jsonl")}
    if (
        given.model not in ("tiny", SMOLLM2) and Path(given.model).exists()
    ):  # those two are no folders, whatever is there
        files["model"] = given.model
    return {name: str(Path(file).absolute()) for name, file in files.items()}


_DECIDED = {
    "output_dir": "--out names the folder",
    **dict.fromkeys(("report_to", "run_name"), "--track names the trackers"),
    **dict.fromkeys(("disable_tqdm",), "--quiet leaves the bar out"),
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step"), "every step goes to metrics.csv"),
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "num_generations_eval", "per_device_eval_batch_size", "metric_for_best_model",
         "greater_is_better", "load_best_model_at_end"), "eval_every says when the model is judged, greedily",
    ),
    "eval_on_start": "the model is always judged before the first step",
    **dict.fromkeys(("log_completions", "num_completions_to_print"), "transcripts says how many are kept"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "it is for scripts"),
}  # fmt: skip
"""Settings of a trainer that a run of the command line decides itself: how."""


def _check_settings(given: Recipe) -> None:
    """Raises UsageError for a setting that would do nothing."""
    for name, how in _DECIDED.items():
        if name in given.config:
            raise UsageError(f"{name}={given.config[name]!r} says nothing in a run of train-lm: {how}; leave it out")


def _of_a_run(out: str | os.PathLike[str], progress_bar: bool | None) -> dict[str, Any]:
    """What a run decides itself: the recorder logs, tracks and evaluates."""
    return {
        "output_dir": os.fspath(out), "report_to": (), "logging_strategy": "no", "eval_strategy": "no",
        "disable_tqdm": None if progress_bar is None else not progress_bar,
    }  # fmt: skip


def _run(
    folder: RunFolder, given: Recipe, trainer: GRPOTrainer, rows: Material, track: tuple[str, ...],
    resume_from: Path | None,
) -> RunResult:  # fmt: skip
    source = trainer.prompts(rows.held_out, "the held-out rows")
    with ExitStack() as stack:
        recorder = Recorder(folder, trainer, lambda: evaluate_greedily(trainer, source), given.eval_every, track, stack)
        trainer.add_callback(recorder)

        def stop() -> None:
            recorder.stop_requested = True

        with stopping_on_signals(stop):
            try:
                trainer.train(resume_from_checkpoint=resume_from)
            except TrainingError as error:
                last = checkpoint.latest(folder.path)
                kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
                raise TrainingError(f"{error} (after {trainer.state.global_step} steps; {kept}).") from error
        if recorder.stop_requested and trainer.state.global_step < trainer.state.max_steps:
            return RunResult(folder, trainer.state.global_step, None, [])
        return _finish(folder, given, trainer, recorder)


def _finish(folder: RunFolder, given: Recipe, trainer: GRPOTrainer, recorder: Recorder) -> RunResult:
    """Evaluate, and leave model, summary, curve and the page of transcripts."""
    from grouprl.runs.plots import plot_run

    notes: list[str] = []
    after = recorder.final()
    trainer.save_model(folder.model_folder)
    write_html(
        folder.transcripts_path, folder.transcripts_page, f"{given.task}: {folder.path.name}", curve=recorder.curve
    )
    try:
        plot_run(folder, y="reward")
    except UsageError as error:
        notes.append(f"no curve: {error}")
    before = recorder.before or HeldOut(float("nan"), float("nan"))
    summary = {
        "task": given.task, "model": given.model, "seed": trainer.args.seed, "total_steps": trainer.state.global_step,
        "train_seconds": recorder.train_seconds, "tokens_per_second": recorder.tokens / recorder.train_seconds,
        "peak_memory_gb": peak_memory_gb(trainer.policy.device), "packed": trainer.policy.packed,
        "accuracy_before": before.accuracy, "accuracy_after": after.accuracy,
        "reward_before": before.reward, "reward_after": after.reward,
    }  # fmt: skip
    folder.write_summary(summary)
    return RunResult(folder, trainer.state.global_step, summary, notes)


def evaluate(
    path: str | os.PathLike[str], n: int | None = None, answers: str | os.PathLike[str] | None = None
) -> tuple[HeldOut, int]:
    """Greedy performance of a run's model on its held-out rows; a larger ``n`` draws more of them.

    Args:
        answers: a new file for what it said and what it got for it, as JSON lines.

    Raises UsageError if there is no such run, it left no model yet, or the file exists.
    """
    if answers is not None and Path(answers).exists():
        raise UsageError(f"{answers} exists; name another file for the answers")
    folder = RunFolder.open(path)
    quiet()
    given = recipe.load(folder.path)
    if n is not None and n < 1:
        raise UsageError(f"cannot evaluate on {n} held-out prompts; ask for at least 1")
    if n is not None and not given.task.endswith(".jsonl"):
        given = given.changed({"n_eval": n})
    config = GRPOConfig(**{**folder.read_config()["config"], **_of_a_run(folder.path, False)})
    rows = material(given)
    model, tokenizer = load_trained(folder, given, config, rows.task)
    config = config.replace(beta=0.0, sync_ref_model=False)
    trainer = GRPOTrainer(model, rows.reward, config, rows.train, processing_class=tokenizer)
    source = trainer.prompts(rows.held_out, "the held-out rows")
    torch.manual_seed(config.seed)
    assert source.size is not None
    with nullcontext() if answers is None else TranscriptWriter(answers) as writer:
        return evaluate_greedily(trainer, source, n, writer), min(n or source.size, source.size)


def load_trained(folder: RunFolder, given: Recipe, config: GRPOConfig, task: Task | None) -> tuple[Any, Any]:
    """The model a run left, or its newest checkpoint, and its tokenizer. Raises UsageError if there is neither."""
    place = trained_model(folder)
    adapter = _adapter(given.lora)
    if adapter is None or given.model != "tiny":
        return load(place, dtype=config.master_dtype)
    from peft import get_peft_model

    # What an adapter was trained on has no name here, but its seed makes it again.
    base, tokenizer = _model(given, config, task)
    model = get_peft_model(base, adapter)
    load_weights(model, place)
    return model, tokenizer


def trained_model(folder: RunFolder) -> Path:
    """The model a run left, or its newest checkpoint. Raises UsageError if there is neither."""
    if folder.model_folder.is_dir():
        return folder.model_folder
    saved = checkpoint.existing(folder.path)
    if not saved:
        raise UsageError(f"{folder.path} holds no model yet; `grouprl resume` goes on with it")
    return saved[-1]

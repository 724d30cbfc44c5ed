"""The books of a run: transformers' state and callbacks, logs, counters, evaluations, and where all of it is recorded.

One bookkeeper serves both ways to train a language model, a script's GRPOTrainer and a run by a recipe; what the second
records besides, it says in a `Recording`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError, shown
from grouprl.lm.generate.samples import Samples
from grouprl.lm.settings.batch_plan import interval
from grouprl.lm.train import best_model, checkpoint, origin
from grouprl.lm.train.evaluation import HeldOut
from grouprl.lm.train.groups import describe_groups
from grouprl.lm.train.setup import Setup
from grouprl.lm.train.sinks import Counters, Metrics, Recording, Sink, Transcripts, open_sinks
from grouprl.lm.train.trackers import tracker_callbacks
from grouprl.machine.torch_defaults import torch_defaults
from grouprl.machine.usage import Usage
from grouprl.runs.lock import locked


def checked_callback(callback: Any) -> Any:
    """A TrainerCallback, object or class, as it is. Raises UsageError for anything else."""
    from transformers import TrainerCallback

    if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
        raise UsageError(f"the callback {shown(callback)} is none; extend transformers.TrainerCallback")
    return callback


class Bookkeeper:
    """State, control and callbacks of a trainer, as transformers' callbacks know them, and all that is recorded.

    Args:
        setup: the trainer's. callbacks: transformers' TrainerCallbacks, objects or classes.

    Attributes:
        state, control: transformers' TrainerState and TrainerControl. handler: its CallbackHandler.
        counters: what the run has done so far. recording: what it records besides; may be replaced before it begins.
        samples: what the last optimizer step learned from (its whole generation).
        began: when the run began, in seconds since 1970, which also tells it from others in its folder.
    """

    def __init__(self, setup: Setup, callbacks: list[Any]) -> None:
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl

        self.setup, self.config = setup, setup.config
        self.recording, self.counters = Recording(), Counters()
        self.samples: Samples | None = None
        self.ranks = setup.policy.ranks
        self.state: Any = self._fresh_state()
        self.control: Any = TrainerControl()
        self.handler: Any = CallbackHandler(  # type: ignore[no-untyped-call]
            [DefaultFlowCallback, *tracker_callbacks(setup.config.report_to), *map(checked_callback, callbacks)],
            setup.model,
            setup.tokenizer,
            setup.optimizer,
            setup.own_scheduler,
        )
        self.began = 0.0
        self._sinks: list[Sink] = []
        self._stack = ExitStack()
        self._sums: dict[str, tuple[float, int]] = {}
        self._newest: Metrics = {}
        self._usage = Usage()
        self.event("on_init_end")

    def event(self, name: str, **values: Any) -> None:
        """Tell the callbacks. Raises UsageError if one returns anything but a TrainerControl or None."""
        from transformers.trainer_callback import TrainerControl

        call, control = getattr(self.handler, name), self.control
        with torch_defaults():
            # log and evaluate events carry their numbers as a positional argument
            told = call(self.config, self.state, control, *values.values())
        if not isinstance(told, TrainerControl):
            raise UsageError(
                f"{name} of a callback returned {shown(told)}; set fields of the control that it is given, and return "
                "that control or nothing"
            )
        self.control = told

    # --- a run --------------------------------------------------------------------------------------------------------

    def begin(self, total: int, updates_per_epoch: int | None, done: int, scheduler: Any) -> None:
        """Start a run of ``total`` steps, of which ``done`` are taken; a stream (None) is one epoch.

        Raises UsageError if the settings do not fit so many steps, something cannot be recorded, or another process
        works in the output folder.
        """
        config, folder = self.config, self.setup.output_dir
        self.state, self._sums, self._newest = self._fresh_state(), {}, {}
        self.counters = Counters()
        self.began = time.time()
        self.state.max_steps = total
        for name in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(config, name)
            steps = config.logging_steps if steps is None else steps
            setattr(self.state, name, interval(steps, total))
        best_model.check_intervals(config, self.state)
        self.state.num_train_epochs = config.num_train_epochs
        self._updates_per_epoch = total if updates_per_epoch is None else updates_per_epoch
        self._epoch_begun = self._epoch_open = False
        self.control.should_training_stop = False
        self.handler.lr_scheduler = scheduler
        self.close()
        if not self.ranks.first:
            return
        self._stack.enter_context(locked(folder))  # and make it: callbacks expect to find it
        checkpoint.finish_beside(folder)
        if done == 0:
            origin.keep_apart(folder)
        for sink in open_sinks(self.setup, self.recording, self.counters, total, done):
            self._stack.callback(sink.close)
            self._sinks.append(sink)

    def _fresh_state(self) -> Any:
        from transformers.trainer_callback import TrainerState

        return TrainerState(is_world_process_zero=self.ranks.first, is_local_process_zero=self.ranks.local == 0)

    def agree(self) -> None:
        """What a callback asks for on one rank is asked for on all."""
        names = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
        for name, asked in zip(names, self.ranks.agree(*(getattr(self.control, n) for n in names)), strict=True):
            setattr(self.control, name, asked)

    def end(self, metrics: Metrics) -> None:
        """Log what is left, and ``metrics`` of the whole run."""
        if self._sums and self.config.logging_strategy != "no":
            self.log_steps()
        self.log(metrics)
        self.event("on_train_end")

    def close(self) -> None:
        """Close trackers, files and the progress bar."""
        self._sinks = []
        self._stack.close()

    # --- a step -------------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """The next step begins, and with it perhaps an epoch."""
        if not self._epoch_begun:
            self.event("on_epoch_begin")
            self._epoch_begun = True
        self.event("on_step_begin")

    def after_step(self, metrics: Metrics, samples: Samples) -> None:
        """An optimizer step was done on (a part of) ``samples``."""
        self.state.global_step += 1
        step = self.state.global_step
        self.state.epoch = step / self._updates_per_epoch
        self.counters.train_seconds += metrics["step_time"]
        self.counters.losses += metrics["loss"]
        beside = self._usage.read()
        if samples is not self.samples:
            self.samples = samples
            self.counters.sampled_tokens += int(samples.lengths.sum())
            self.counters.curve[step] = metrics.get("reward", float(samples.returns.mean()))
            beside |= describe_groups(samples)
        for key, value in metrics.items():
            total, n = self._sums.get(key, (0.0, 0))
            self._sums[key] = (total + value, n + 1)
        self._newest = metrics
        recorded = {**metrics, **beside}
        self._tell(lambda sink: sink.after_step(step, recorded, samples))
        self.event("on_step_end")

    def ends_epoch(self) -> bool:
        """Whether the last step was the last of an epoch, or of all; callbacks are told."""
        step = self.state.global_step
        if step % self._updates_per_epoch and step < self.state.max_steps and not self.control.should_training_stop:
            return False
        self._epoch_begun = False
        self.event("on_epoch_end")
        return True

    def ends_epoch_late(self) -> bool:
        """Whether the checkpoint that the run goes on from was written with the last step of an epoch.

        It was written before callbacks heard of the end of that epoch, so they are told now.
        """
        is_open, self._epoch_open = self._epoch_open, False
        return is_open and self.ends_epoch()

    def flush(self) -> None:
        """Record what is held back of the last step."""
        self._tell(lambda sink: sink.flush())

    # --- logs and evaluations -----------------------------------------------------------------------------------------

    def log_steps(self) -> None:
        """Log the means since the last time; counters and rates as they are now."""
        self.control.should_log = False
        if not self._sums:
            return
        logs = {key: total / n for key, (total, n) in self._sums.items()}
        for key in ("num_tokens", "learning_rate"):
            if key in self._newest:
                logs[key] = self._newest[key]
        self._sums = {}
        self.log(logs)

    def log(self, logs: Metrics) -> None:
        """Append to the history, tell sinks and callbacks."""
        logs = self._with_epoch(logs)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._tell(lambda sink: sink.log(self.state.global_step, logs))
        self.event("on_log", logs=logs)

    def after_evaluation(self, metrics: Metrics) -> None:
        """``GRPOTrainer.evaluate`` gave ``metrics``: log them, record them, tell the callbacks."""
        self.control.should_evaluate = False
        logs = self._with_epoch(metrics)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        prefix = self.recording.sampled_as
        recorded = {f"{prefix}{k[5:]}" if k.startswith("eval_") else k: v for k, v in metrics.items()}
        self._tell(lambda sink: sink.evaluation(self.state.global_step, recorded))
        self.event("on_log", logs=logs)
        self.event("on_evaluate", metrics=metrics)

    def record_held_out(self, result: HeldOut) -> None:
        """Record a greedy evaluation of a run by a recipe, which is no part of the log history."""
        if self.state.global_step == 0:
            self.counters.before = result
        columns = {"eval_reward": result.reward, "eval_accuracy": result.accuracy}
        if "episodes/mean_turns" in result.numbers:
            columns["eval_turns"] = result.numbers["episodes/mean_turns"]
        self._tell(lambda sink: sink.evaluation(self.state.global_step, columns))

    def _with_epoch(self, logs: Metrics) -> Metrics:
        return logs if self.state.epoch is None else {**logs, "epoch": self.state.epoch}

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            what(sink)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint_path(self) -> Path:
        """Where the checkpoint of this step goes; noted as the best model's, if that is what it is."""
        path = self.setup.output_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(path)
        return path

    def after_save(self, path: Path) -> None:
        """A checkpoint was written: drop the oldest ones beyond the limit."""
        self.control.should_save = False
        limit = self.config.save_total_limit
        if limit is not None and self.ranks.first:
            best = best_model.best_checkpoint(self.state) if self.config.load_best_model_at_end else None
            spared = {place.resolve() for place in (path, best) if place is not None}
            own = checkpoint.of_run(self.setup.output_dir, self.began)
            others = [old for old in own if old.resolve() not in spared]
            for old in others[: max(0, len(others) + len(spared) - limit)]:
                shutil.rmtree(old)
        self.event("on_save")

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the state, the counters, and what was gathered since the last log."""
        transcripts = self._transcripts()
        return {
            "state": checkpoint.trainer_state(self.state), "counters": self.counters.to_dict(),
            "sums": {key: list(value) for key, value in self._sums.items()},
            "epoch_open": self._epoch_begun,
            "transcribed": transcripts is not None and transcripts.up_to_date,
            "files": {type(sink).__name__: mark for sink in self._sinks if (mark := sink.mark()) is not None},
        }  # fmt: skip

    def load(self, saved: dict[str, Any], samples: Samples | None) -> None:
        """The inverse of :meth:`to_dict`, within the generation ``samples`` or (None) between two.

        The intervals stay those of this run. Raises UsageError if a file cannot be gone on with.
        """
        for name, value in saved["state"].items():
            if name not in ("max_steps", "logging_steps", "eval_steps", "save_steps", "num_train_epochs"):
                if not hasattr(self.state, name):
                    raise UsageError(f"the checkpoint has {name!r} in its state, which this transformers does not know")
                setattr(self.state, name, value)
        best_model.find_moved(self.state, self.setup.output_dir)
        self._sums = {key: (total, n) for key, (total, n) in saved["sums"].items()}
        vars(self.counters).update(vars(Counters.from_dict(saved["counters"])))  # the sinks hold this very object
        if samples is not None:
            self.samples = samples
        self._epoch_open, marks = saved["epoch_open"], saved["files"]
        self._tell(lambda sink: sink.resume(self.state.global_step, marks.get(type(sink).__name__)))
        transcripts = self._transcripts()
        if transcripts is not None:
            transcripts.take_up(samples, saved["transcribed"])

    def _transcripts(self) -> Transcripts | None:
        return next((sink for sink in self._sinks if isinstance(sink, Transcripts)), None)

"""What surrounds the steps: transformers' callbacks, logging, trackers, progress, the folder of a run."""

from __future__ import annotations

import shutil
import warnings
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.generate.samples import Samples
from grouprl.lm.settings.batch_plan import interval
from grouprl.lm.train import checkpoint
from grouprl.lm.train.transcripts import TranscriptWriter, transcripts_of, whole_groups
from grouprl.runs import Progress, make_trackers
from grouprl.runs.files import explain_os_error
from grouprl.runs.folder import default_run_path

Metrics = dict[str, float]

_SHOWN = (
    "reward", "reward_std", "loss", "grad_norm", "entropy", "kl", "completions/mean_length",
    "completions/clipped_ratio", "learning_rate", "step_time",
)  # fmt: skip
"""What is shown of a step's numbers."""


class Flow:
    """State, control and callbacks of a trainer, as transformers' callbacks know them.

    Attributes:
        state, control: transformers' TrainerState and TrainerControl. handler: its CallbackHandler.
        output_dir: where checkpoints go. newest: metrics of the last step.
    """

    def __init__(self, trainer: Any, callbacks: list[Any]) -> None:
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState

        self.trainer, self.config = trainer, trainer.args
        name = str(getattr(trainer.model.config, "_name_or_path", "") or "model").rstrip("/").split("/")[-1]
        given = self.config.output_dir
        self.output_dir = (
            Path(given) if given is not None else default_run_path("runs", f"{name}-grpo", self.config.seed)
        )
        self.state: Any = TrainerState()
        self.control: Any = TrainerControl()
        self.handler: Any = CallbackHandler(  # type: ignore[no-untyped-call]
            [DefaultFlowCallback, *callbacks],
            trainer.model,
            trainer.processing_class,
            trainer.optimizer,
            trainer.lr_scheduler,
        )
        self.event("on_init_end")
        self._sums: dict[str, tuple[float, int]] = {}
        self.newest: Metrics = {}
        self._trackers: list[Any] = []
        self._progress: Progress | None = None
        self._stack = ExitStack()

    def event(self, name: str, **values: Any) -> None:
        """Tell the callbacks."""
        call = getattr(self.handler, name)
        # log and evaluate events carry their numbers as a positional argument
        self.control = call(self.config, self.state, self.control, *values.values())

    def begin(self, total: int, updates_per_epoch: int | None, done: int) -> None:
        """Start a run of ``total`` steps, of which ``done`` are taken; a stream (None) is one epoch."""
        from transformers.trainer_callback import TrainerState

        config = self.config
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)  # callbacks expect to find it
        except OSError as error:
            raise explain_os_error(error, self.output_dir) from error
        self.state, self._sums, self.newest = TrainerState(), {}, {}
        self.state.max_steps = total
        for name in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(config, name)
            steps = config.logging_steps if steps is None else steps
            setattr(self.state, name, interval(steps, total))
        if config.load_best_model_at_end and config.eval_strategy == "steps":
            every, saves = self.state.eval_steps, self.state.save_steps
            if saves % every:
                raise UsageError(
                    f"load_best_model_at_end=True: in a run of {total} steps models are saved every {saves} steps and "
                    f"judged every {every}; set save_steps to a multiple of eval_steps"
                )
        self.state.num_train_epochs = config.num_train_epochs
        self._updates_per_epoch = total if updates_per_epoch is None else updates_per_epoch
        self._epoch_begun = False
        self.control.should_training_stop = False
        self.handler.lr_scheduler = self.trainer.lr_scheduler
        self._stack.close()
        self._trackers = make_trackers(
            config.report_to, tensorboard_folder=self.output_dir / "tensorboard", wandb_folder=self.output_dir,
            name=config.run_name or self.output_dir.name, config=config.to_dict(),
        )  # fmt: skip
        for tracker in self._trackers:
            self._stack.callback(tracker.close)
        self._transcripts = self._stack.enter_context(TranscriptWriter(self.output_dir / "transcripts.jsonl"))
        self._written: Samples | None = None
        enabled = None if config.disable_tqdm is None else not config.disable_tqdm
        self._progress = self._stack.enter_context(Progress(total, enabled, done=done))

    def load_best(self) -> None:
        """Go back to the best model, or say why that is not possible."""
        if self.best is not None:
            self.trainer.load_weights(self.best)
        elif self.state.best_global_step is not None:
            warnings.warn(
                f"the best model, of step {self.state.best_global_step}, is in no checkpoint any more (it was "
                f"{self.state.best_model_checkpoint}); the last one is kept",
                stacklevel=2,
            )

    def end(self, metrics: Metrics) -> None:
        """Log what is left, and ``metrics`` of the whole run."""
        if self._sums and self.config.logging_strategy != "no":
            self.log_steps()
        self.log(metrics)
        self.event("on_train_end")

    def close(self) -> None:
        """Close trackers and progress bar."""
        self._stack.close()
        self._trackers, self._progress = [], None

    def step_begins(self) -> None:
        """The next step begins, and with it perhaps an epoch."""
        if not self._epoch_begun:
            self.event("on_epoch_begin")
            self._epoch_begun = True
        self.event("on_step_begin")

    def stepped(self, metrics: Metrics) -> None:
        """An optimizer step is done."""
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self._updates_per_epoch
        for key, value in metrics.items():
            total, n = self._sums.get(key, (0.0, 0))
            self._sums[key] = (total + value, n + 1)
        self.newest = metrics
        if self._progress is not None:
            self._progress.update(self.state.global_step, reward=metrics.get("reward"), loss=metrics["loss"])
        self.event("on_step_end")

    def epoch_ends(self) -> bool:
        """Whether the last step was the last of an epoch, or of all; callbacks are told."""
        step = self.state.global_step
        if step % self._updates_per_epoch and step < self.state.max_steps and not self.control.should_training_stop:
            return False
        self._epoch_begun = False
        self.event("on_epoch_end")
        return True

    def log_steps(self) -> None:
        """Log the means since the last time; counters and rates as they are now."""
        self.control.should_log = False
        if not self._sums:
            return
        logs = {key: total / n for key, (total, n) in self._sums.items()}
        for key in ("num_tokens", "learning_rate"):
            if key in self.newest:
                logs[key] = self.newest[key]
        self._sums = {}
        self.log(logs)
        samples = self.trainer.last_samples
        if self.config.log_completions and samples is not None:
            print(_shown(samples, self.state.global_step, self.config.num_completions_to_print))
            if samples is not self._written:
                self._written, kept = samples, whole_groups(samples, self.config.transcripts)
                names = self.trainer.rewards.names
                self._transcripts.append(transcripts_of(samples, names, self.state.global_step, kept))

    def log(self, logs: Metrics) -> None:
        """Append to the history, tell trackers and callbacks."""
        if self.state.epoch is not None:
            logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        for tracker in self._trackers:
            tracker.log(_arranged(logs), self.state.global_step)
        if self._progress is not None and self.config.logging_strategy != "no":
            self._progress.say(_line(logs, self.state.global_step, self.state.max_steps))
        self.event("on_log", logs=logs)

    def evaluated(self, metrics: Metrics) -> None:
        """An evaluation is done."""
        self.control.should_evaluate = False
        self.log(metrics)
        self.event("on_evaluate", metrics=metrics)

    def judge(self, metrics: Metrics) -> None:
        """Note the model as the best so far, if the numbers of its evaluation say so.

        Raises UsageError if the number that decides is not among them.
        """
        wanted = self.config.metric_for_best_model
        if wanted is None:
            return
        name = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
        if name not in metrics:
            raise UsageError(
                f"metric_for_best_model={wanted!r} is not among the numbers of an evaluation, which are "
                f"{', '.join(sorted(metrics))}"
            )
        value, best = metrics[name], self.state.best_metric
        if isfinite(value) and (best is None or (value > best if self.config.greater_is_better else value < best)):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    @property
    def best(self) -> Path | None:
        """The best model's checkpoint, if there is one."""
        path, step = self.state.best_model_checkpoint, self.state.best_global_step
        found = None if path is None else Path(path)
        return found if found is not None and found.name == f"checkpoint-{step}" and found.is_dir() else None

    def saves(self) -> Path:
        """Where the checkpoint of this step goes; noted as the best model's, if that is what it is."""
        path = self.output_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(path)
        return path

    def saved(self, path: Path) -> None:
        """A checkpoint was written: drop the oldest ones beyond the limit."""
        self.control.should_save = False
        limit = self.config.save_total_limit
        if limit is not None:
            best = self.best if self.config.load_best_model_at_end else None
            spared = {place.resolve() for place in (path, best) if place is not None}
            others = [old for old in checkpoint.existing(self.output_dir) if old.resolve() not in spared]
            for old in others[: max(0, len(others) + len(spared) - limit)]:
                shutil.rmtree(old)
        self.event("on_save")

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the state, and what was gathered since the last log."""
        written = self._written is not None and self._written is self.trainer.last_samples
        sums = {k: list(v) for k, v in self._sums.items()}
        return {"state": checkpoint.trainer_state(self.state), "sums": sums, "written": written}

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`to_dict`, once the samples at hand are back; the intervals stay those of this run."""
        for name, value in saved["state"].items():
            if name not in ("max_steps", "logging_steps", "eval_steps", "save_steps", "num_train_epochs"):
                if not hasattr(self.state, name):
                    raise UsageError(f"the checkpoint has {name!r} in its state, which this transformers does not know")
                setattr(self.state, name, value)
        self._sums = {key: (total, n) for key, (total, n) in saved["sums"].items()}
        if self.config.log_completions:
            self._transcripts.truncate_after(self.state.global_step)
            self._written = self.trainer.last_samples if saved.get("written") else None


def _shown(samples: Samples, step: int, n: int | None) -> str:
    """The first ``n`` samples for a person to read."""
    lines = [f"--- completions of step {step}"]
    for i in range(min(n or len(samples), len(samples))):
        prompt = samples.prompts[int(samples.group[i])].prompt
        asked = prompt if isinstance(prompt, str) else prompt[-1].get("content")
        lines.append(f"reward {float(samples.returns[i]):8.3f} | {asked!r} -> {samples.texts[i]!r}")
    return "\n".join(lines)


def _line(logs: Metrics, step: int, total: int) -> str:
    """Logged numbers for a person to read: of training what says most, of others all."""
    chosen = {name: logs[name] for name in _SHOWN if name in logs} or {k: v for k, v in logs.items() if k != "epoch"}
    return f"step {step}/{total}: " + ", ".join(f"{name} {value:.4g}" for name, value in chosen.items())


def _arranged(logs: Metrics) -> Metrics:
    """Names as trackers group them: train/ and eval/."""
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in logs.items()}

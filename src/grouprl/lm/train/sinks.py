"""Where the numbers and the completions of a run go: trackers, a metrics file, transcripts, a person who watches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from grouprl.doctor import Watch
from grouprl.lm.generate.samples import Samples
from grouprl.lm.messages import message_text
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.trackers import OWN_TRACKERS
from grouprl.lm.train.evaluation import HeldOut
from grouprl.lm.train.setup import Setup
from grouprl.lm.train.trackers import table_of
from grouprl.lm.train.transcripts import transcripts_of, whole_groups
from grouprl.printing import show
from grouprl.runs import MetricsLog, Progress, Tracker, make_trackers, read_metrics
from grouprl.runs.trackers import WandbTracker
from grouprl.runs.transcripts import TranscriptWriter

Metrics = dict[str, float]
Mark = Mapping[str, Any]

_log = logging.getLogger("grouprl")

_SHOWN = (
    "reward", "reward_std", "loss", "grad_norm", "entropy", "kl", "completions/mean_length",
    "completions/clipped_ratio", "learning_rate", "step_time",
)  # fmt: skip
"""What is shown of a step's numbers."""


@dataclass
class Counters:
    """What a run has done so far. Its checkpoints hold them, whatever becomes of its other files.

    Attributes:
        train_seconds: of optimizer steps alone. sampled_tokens: of all completions.
        losses: sum over the optimizer steps. curve: mean reward of each generation, by its first step.
        before: greedy performance before the first step, if it was measured.
    """

    train_seconds: float = 0.0
    sampled_tokens: int = 0
    losses: float = 0.0
    curve: dict[int, float] = field(default_factory=dict)
    before: HeldOut | None = None

    def columns(self) -> Metrics:
        """Those that are recorded at each step."""
        return {"train_seconds": self.train_seconds, "sampled_tokens": self.sampled_tokens}

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps them."""
        before = None if self.before is None else [self.before.reward, self.before.accuracy]
        return {**vars(self), "curve": list(self.curve.items()), "before": before}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Counters:
        """The inverse of :meth:`to_dict`."""
        before = None if saved["before"] is None else HeldOut(*saved["before"])
        return cls(**{**saved, "curve": {int(step): reward for step, reward in saved["curve"]}, "before": before})


@dataclass(frozen=True)
class Recording:
    """What a run records beside the logs of its trainer; the defaults are those of a script.

    Attributes:
        metrics_path: a metrics file, with a row for each optimizer step; None: none.
        each_generation: write transcripts of all generations, not only of those that ``log_completions`` prints.
        lines: say each log in a line on standard error.
        sampled_as: what the names of evaluations on sampled completions begin with in trackers and the metrics file.
        about: the configuration that trackers show; None: the settings.
    """

    metrics_path: Path | None = None
    each_generation: bool = False
    lines: bool = True
    sampled_as: str = "eval_"
    about: Mapping[str, Any] | None = None


class Sink:
    """Hears of a run; each method does nothing unless a subclass has something to do."""

    def after_step(self, step: int, metrics: Metrics, samples: Samples) -> None:
        """An optimizer step was done on (a part of) ``samples``."""

    def log(self, step: int, logs: Metrics) -> None:
        """Means over the steps since the last log, or numbers of the whole run."""

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """The model was evaluated after ``step`` steps."""

    def flush(self) -> None:
        """Nothing more will come of this step; a checkpoint may follow."""

    def mark(self) -> Mark | None:
        """What the file of this sink holds now, for a checkpoint; None if it has none."""
        return None

    def resume(self, step: int, mark: Mark | None) -> None:
        """The run goes on from a checkpoint of ``step``, which holds ``mark``; None if there was no such sink then."""

    def close(self) -> None:
        """The run has ended."""


class Trackers(Sink):
    """TensorBoard and Weights & Biases, with names grouped as train/ and eval/."""

    def __init__(self, trackers: list[Tracker], counters: Counters) -> None:
        self.trackers, self.counters = trackers, counters

    def log(self, step: int, logs: Metrics) -> None:
        self._show(step, {**logs, **self.counters.columns()})

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._show(step, metrics)

    def _show(self, step: int, metrics: Metrics) -> None:
        names = {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in metrics.items()}
        for tracker in self.trackers:
            tracker.log(names, step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class MetricsFile(Sink):
    """A row for each optimizer step, with the evaluations after it; an evaluation that comes later has its own row."""

    def __init__(self, path: Path, counters: Counters) -> None:
        self.file, self.counters = MetricsLog(path), counters
        self._row: Metrics = {}

    def after_step(self, step: int, metrics: Metrics, samples: Samples) -> None:
        self.flush()
        self._row = {"step": step, **self.counters.columns(), **metrics}

    def evaluation(self, step: int, metrics: Metrics) -> None:
        if self._row.keys() & metrics.keys():
            self.flush()
        self._row = (self._row or {"step": step, **self.counters.columns()}) | metrics
        if "loss" not in self._row:  # of no step that is being recorded
            self.flush()

    def flush(self) -> None:
        if self._row:
            self.file.append(self._row)
        self._row = {}

    def mark(self) -> Mark:
        return self.file.mark()

    def resume(self, step: int, mark: Mark | None) -> None:
        if mark is not None and self.file.resume(step, mark):
            return
        self.file.truncate_after("step", step)
        recorded = read_metrics(self.file.path).get("step", ()) if self.file.path.exists() else ()
        missing = sorted(set(range(step + 1)) - {int(row) for row in recorded if row == row})
        if missing:
            _log.warning(
                "%s has lost the rows of step %s. The run goes on as it would have: what it counts is in its "
                "checkpoint. The file and its curve lack these steps.", self.file.path, _ranges(missing),
            )  # fmt: skip

    def close(self) -> None:
        self.flush()
        self.file.close()


class Transcripts(Sink):
    """Completions for a person to read: printed with the logs if log_completions asks for it, and in a file."""

    def __init__(self, path: Path, names: tuple[str, ...], config: GRPOConfig, each_generation: bool) -> None:
        self.writer = TranscriptWriter(path)
        self.names, self.config, self.each_generation = names, config, each_generation
        self._samples: Samples | None = None
        self._written: Samples | None = None

    @property
    def up_to_date(self) -> bool:
        """Whether the generation that is being learned from is in the file."""
        return self._written is not None and self._written is self._samples

    def take_up(self, samples: Samples | None, written: bool) -> None:
        """Go on within a generation, which is in the file already or not."""
        self._samples = samples
        self._written = samples if written else None

    def after_step(self, step: int, metrics: Metrics, samples: Samples) -> None:
        self._samples = samples
        if self.each_generation:
            self._write(step)

    def log(self, step: int, logs: Metrics) -> None:
        if self.config.log_completions and self._samples is not None and "loss" in logs:
            show(_shown(self._samples, step, self.config.num_completions_to_print))
            self._write(step)

    def _write(self, step: int) -> None:
        if self._samples is not None and not self.up_to_date:
            self._written, n = self._samples, whole_groups(self._samples, self.config.transcripts)
            self.writer.append(transcripts_of(self._samples, self.names, step, n))

    def mark(self) -> Mark:
        return self.writer.mark()

    def resume(self, step: int, mark: Mark | None) -> None:
        self.writer.resume(step, mark)

    def close(self) -> None:
        self.writer.close()


class CompletionTables(Sink):
    """Completions as tables of Weights & Biases and of Trackio, whenever the numbers of steps are logged."""

    def __init__(self, trackers: Sequence[Tracker], report_to: Sequence[str], names: tuple[str, ...]) -> None:
        self.boards = [tracker for tracker in trackers if isinstance(tracker, WandbTracker)]
        self.trackio, self.names = "trackio" in report_to, names
        self._samples: Samples | None = None

    def after_step(self, step: int, metrics: Metrics, samples: Samples) -> None:
        self._samples = samples

    def log(self, step: int, logs: Metrics) -> None:
        if self._samples is None or "loss" not in logs or not (self.boards or self.trackio):
            return
        columns, rows = table_of(self._samples, self.names, step)
        for board in self.boards:
            board.log_table("completions", columns, rows, step)
        if self.trackio:
            trackio = import_module("trackio")  # its callback has found it, and begun the run
            trackio.log({"completions": trackio.Table(columns=columns, data=rows)})


class Doctor(Sink):
    """Warns once of each illness that the numbers of the steps show."""

    def __init__(self, config: GRPOConfig, total: int) -> None:
        self.watch, self.total = Watch(config.to_dict(), language_model=True), total
        self._evaluated: Metrics = {}

    def after_step(self, step: int, metrics: Metrics, samples: Samples) -> None:
        self.watch.note({**metrics, **self._evaluated}, step / self.total)
        self._evaluated = {}

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._evaluated = metrics


class Console(Sink):
    """A progress bar, or lines where there is no terminal; and each log as a line."""

    def __init__(self, progress: Progress, total: int, lines: bool) -> None:
        self.progress, self.total, self.lines = progress, total, lines

    def after_step(self, step: int, metrics: Metrics, samples: Samples) -> None:
        self.progress.update(step, reward=metrics.get("reward"), loss=metrics["loss"])

    def log(self, step: int, logs: Metrics) -> None:
        if self.lines:
            self.progress.say(_line(logs, step, self.total))

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self.log(step, metrics)

    def close(self) -> None:
        self.progress.close()


def open_sinks(setup: Setup, recording: Recording, counters: Counters, total: int, done: int) -> Iterable[Sink]:
    """Where a run of ``total`` steps, of which ``done`` are taken, records: each sink as soon as it is open.

    Raises UsageError if a file cannot be written or a tracker's package is missing.
    """
    config, folder = setup.config, setup.output_dir
    about = config.to_dict() if recording.about is None else recording.about
    trackers = make_trackers(
        tuple(name for name in config.report_to if name in OWN_TRACKERS), tensorboard_folder=folder / "tensorboard",
        wandb_folder=folder, name=config.run_name or folder.name, config=about,
    )  # fmt: skip
    yield Trackers(trackers, counters)
    if recording.metrics_path is not None:
        yield MetricsFile(recording.metrics_path, counters)
    if recording.each_generation or config.log_completions:
        yield Transcripts(folder / "transcripts.jsonl", setup.player.names, config, recording.each_generation)
    if config.log_completions:
        yield CompletionTables(trackers, config.report_to, setup.player.names)
    yield Doctor(config, total)
    bar = None if config.disable_tqdm is None else not config.disable_tqdm
    lines = recording.lines and config.logging_strategy != "no"
    yield Console(Progress(total, bar, done=done), total, lines)


def _shown(samples: Samples, step: int, n: int | None) -> str:
    """The first ``n`` samples for a person to read."""
    lines = [f"--- completions of step {step}"]
    for i in range(min(n or len(samples), len(samples))):
        prompt = samples.prompts[int(samples.group[i])].prompt
        asked = prompt if isinstance(prompt, str) else message_text(prompt[-1])
        lines.append(f"reward {float(samples.returns[i]):8.3f} | {asked!r} -> {samples.texts[i]!r}")
    return "\n".join(lines)


def _line(logs: Metrics, step: int, total: int) -> str:
    """Logged numbers for a person to read: of training what says most, of others all."""
    chosen = {name: logs[name] for name in _SHOWN if name in logs} or {k: v for k, v in logs.items() if k != "epoch"}
    return f"step {step}/{total}: " + ", ".join(f"{name} {value:.4g}" for name, value in chosen.items())


def _ranges(steps: list[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    texts, first = [], steps[0]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following != step + 1:
            texts.append(str(first) if first == step else f"{first} to {step}")
            first = following if following is not None else step
    return ", ".join(texts)

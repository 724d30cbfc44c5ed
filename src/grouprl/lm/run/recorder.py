"""What a run of the command line writes while it trains: metrics, transcripts, greedy accuracy on held-out prompts."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from grouprl.errors import UsageError
from grouprl.lm.generate.collect import sample_and_score
from grouprl.lm.generate.samples import Samples
from grouprl.lm.policy.policy import sampling_settings
from grouprl.lm.prompts import PromptSource
from grouprl.lm.train.trainer import GRPOTrainer
from grouprl.lm.train.transcripts import TranscriptWriter, transcripts_of, transcripts_of_scored, whole_groups
from grouprl.runs import MetricsLog, RunFolder, make_trackers, read_metrics

ROWS_AT_ONCE = 256
"""Held-out prompts sampled side by side."""


@dataclass(frozen=True)
class HeldOut:
    """Greedy performance on held-out prompts: mean reward, and the share of prompts with a reward of 1 or more."""

    reward: float
    accuracy: float


def evaluate_greedily(
    trainer: GRPOTrainer, source: PromptSource, n: int | None = None, answers: TranscriptWriter | None = None
) -> HeldOut:
    """One completion of the likeliest tokens for each of the first ``n`` prompts (default: all).

    Args:
        answers: keeps them.
    """
    assert source.size is not None
    prompts = [source[i] for i in range(min(n or source.size, source.size))]
    settings = sampling_settings(trainer.args, greedy=True)
    returns: list[float] = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        drawn = sample_and_score(
            trainer.policy, trainer.processing_class, trainer.rewards, prompts[start : start + ROWS_AT_ONCE], 1,
            torch.Generator().manual_seed(0), settings, trainer.state,
        )  # fmt: skip
        returns += drawn.returns.tolist()
        if answers is not None:
            answers.append(transcripts_of_scored(drawn, trainer.rewards.names))
    values = torch.tensor(returns, dtype=torch.float64)
    return HeldOut(float(values.mean()), float((values >= 1 - 1e-9).double().mean()))


class Recorder(TrainerCallback):
    """Writes metrics.csv, the trackers' files and transcripts.jsonl of a run folder.

    Args:
        evaluate: greedy performance now. every: optimizer steps between two evaluations; 0: only before and after.
        track: trackers. resumed: go on with what the folder holds, from the trainer's current step.

    Attributes:
        before, newest: the first and the last evaluation.
        train_seconds: of optimizer steps alone. tokens: sampled completion tokens.
        curve: mean reward of each generation, by step.
    """

    def __init__(
        self, folder: RunFolder, trainer: GRPOTrainer, evaluate: Callable[[], HeldOut], every: int,
        track: tuple[str, ...], stack: ExitStack,
    ) -> None:  # fmt: skip
        self.folder, self.trainer, self.evaluate, self.every = folder, trainer, evaluate, every
        self.before: HeldOut | None = None
        self.newest: tuple[int, HeldOut] | None = None
        self.train_seconds, self.tokens = 0.0, 0
        self.stop_requested = False
        self._samples: Samples | None = None
        self.curve: dict[int, float] = {}
        self.log = stack.enter_context(MetricsLog(folder.metrics_path))
        self.transcripts = stack.enter_context(TranscriptWriter(folder.transcripts_path))
        self.trackers = make_trackers(
            track, tensorboard_folder=folder.tensorboard_path, wandb_folder=folder.path,
            name=folder.path.name, config=folder.read_config(),
        )  # fmt: skip
        for tracker in self.trackers:
            stack.callback(tracker.close)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate before the first step, or take up where the checkpoint left off."""
        if state.global_step == 0:
            self.before = self.evaluate()
            self._write({"step": 0, "train_seconds": 0.0, "sampled_tokens": 0, **self._columns(0, self.before)})
            return
        self.log.truncate_after("step", state.global_step)
        self.transcripts.truncate_after(state.global_step)
        rows = read_metrics(self.folder.metrics_path)
        lost = {"step", "train_seconds", "sampled_tokens", "eval_reward", "eval_accuracy"} - rows.keys()
        if lost or not len(rows["step"]):
            raise UsageError(
                f"{self.folder.metrics_path} has lost its rows, which a resumed run goes on from; put back a copy, or "
                "train anew with another --out"
            )
        self.train_seconds, self.tokens = float(rows["train_seconds"][-1]), int(rows["sampled_tokens"][-1])
        self.before = HeldOut(float(rows["eval_reward"][0]), float(rows["eval_accuracy"][0]))
        self._samples = self.trainer.last_samples
        self.curve = {
            int(step): float(reward)
            for step, reward in zip(rows["step"], rows.get("reward", []), strict=False)
            if reward == reward
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the step's row and transcripts."""
        metrics = dict(self.trainer.flow.newest)
        self.train_seconds += metrics["step_time"]
        samples = self.trainer.last_samples
        if samples is not None and samples is not self._samples:
            self._samples = samples
            self.tokens += int(samples.lengths.sum())
            self._transcribe(samples, state.global_step)
        row = {"step": state.global_step, "train_seconds": self.train_seconds, "sampled_tokens": self.tokens, **metrics}
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            row |= self._columns(state.global_step, self.evaluate())
        self._write(row)
        if self.stop_requested:
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Now the run can be resumed from."""
        self.folder.settle()

    def final(self) -> HeldOut:
        """The evaluation after the last step, written as a row of its own."""
        step = self.trainer.state.global_step
        if self.newest is None or self.newest[0] != step:
            self._write({
                "step": step, "train_seconds": self.train_seconds, "sampled_tokens": self.tokens,
                **self._columns(step, self.evaluate()),
            })  # fmt: skip
        assert self.newest is not None
        return self.newest[1]

    def _columns(self, step: int, result: HeldOut) -> dict[str, float]:
        self.newest = (step, result)
        return {"eval_reward": result.reward, "eval_accuracy": result.accuracy}

    def _write(self, row: dict[str, float]) -> None:
        self.log.append(row)
        for tracker in self.trackers:
            tracker.log({key: value for key, value in row.items() if key != "step"}, int(row["step"]))

    def _transcribe(self, samples: Samples, step: int) -> None:
        self.curve[step] = float(samples.returns.mean())
        kept = whole_groups(samples, self.trainer.args.transcripts)
        self.transcripts.append(transcripts_of(samples, self.trainer.rewards.names, step, kept))


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far, in 10^9 bytes: of the accelerator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

"""What a run by a recipe does beside training: it evaluates greedily now and then, and stops when it is asked to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import TrainerCallback

from grouprl.lm.prompts import PromptSource
from grouprl.lm.train.bookkeeper import Bookkeeper
from grouprl.lm.train.evaluation import HeldOut, evaluate_greedily
from grouprl.lm.train.setup import Setup
from grouprl.runs import RunFolder

Evaluated = Callable[[int, float, HeldOut], None]
"""Is told of an evaluation: the step, the seconds of training, and what was found."""


class HeldOutEvaluation(TrainerCallback):
    """Greedy performance on held-out prompts: before the first step, every so many steps, and after the last.

    Args:
        setup, book: the trainer's. prompts: the held-out ones. folder: is settled once the run can be resumed.
        every: optimizer steps between two evaluations; 0: only before and after.
        told: is told of each, with its step and the seconds of training before it.

    Attributes:
        stop_requested: whether to save and stop after the step in progress.
        after: greedy performance at the end; None before, and of a run that was stopped.
    """

    def __init__(
        self, setup: Setup, book: Bookkeeper, prompts: PromptSource, folder: RunFolder, every: int,
        told: Evaluated | None = None,
    ) -> None:  # fmt: skip
        self.setup, self.book, self.prompts, self.folder, self.every = setup, book, prompts, folder, every
        self.told = told
        self.stop_requested = False
        self.after: HeldOut | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate before the first step."""
        if state.global_step == 0:
            self.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate if it is time, and stop if that was asked for."""
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.evaluate()
        if self.stop_requested:
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Now the run can be resumed from."""
        if state.is_world_process_zero:
            self.folder.settle()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the model that training ends with, unless the run is to be resumed."""
        if not self.interrupted:
            self.after = self.evaluate()

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its last step."""
        return self.stop_requested and self.book.state.global_step < self.book.state.max_steps

    def evaluate(self) -> HeldOut:
        """Evaluate the model as it is now, and record the result."""
        result = evaluate_greedily(self.setup, self.prompts, state=self.book.state)
        self.book.record_held_out(result)
        if self.told is not None:
            self.told(self.book.state.global_step, self.book.counters.train_seconds, result)
        return result

"""The loop of training: generations, optimizer steps on them, and what a checkpoint must remember between two steps."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.learning.shards import held
from grouprl.lm.generate.collect import Collector
from grouprl.lm.generate.samples import Samples
from grouprl.lm.generate.scored_groups import Metrics
from grouprl.lm.kernels import compile as kernels
from grouprl.lm.learn.entropy_control import EntropyControl
from grouprl.lm.learn.optimizer import follow_settings, load_optimizer_state, make_schedule, optimizer_state, stepped_by
from grouprl.lm.learn.step import Step, optimizer_step
from grouprl.lm.models.adapters import has_adapters
from grouprl.lm.prompts import PromptOrder
from grouprl.lm.sample.streams import Stream
from grouprl.lm.settings.batch_plan import steps_per_epoch, total_steps
from grouprl.lm.train import best_model, checkpoint, origin
from grouprl.lm.train.bookkeeper import Bookkeeper
from grouprl.lm.train.checkpoint import Checkpoint
from grouprl.lm.train.setup import Setup
from grouprl.machine.busy import sleeping_when_busy
from grouprl.machine.record import describe_machine, other_machine
from grouprl.objective import Objective
from grouprl.runs.state import check_like, taking_up

_log = logging.getLogger("grouprl")


class TrainOutput(NamedTuple):
    """What :meth:`GRPOTrainer.train` returns, named as transformers names it."""

    global_step: int
    training_loss: float
    metrics: Metrics


class Run:
    """One call of train: the loop and what it must remember between two steps.

    Args:
        setup: model, data, optimizer and settings. book: told of everything that happens.
        evaluate: evaluates the model, tells ``book`` and returns the numbers.
        resumed: the checkpoint to go on from, whose weights the model has already.

    Raises UsageError if there is nothing to train on, or the checkpoint does not fit.
    """

    def __init__(
        self, setup: Setup, book: Bookkeeper, evaluate: Callable[[], Metrics], resumed: Checkpoint | None
    ) -> None:
        self.setup, self.book, self.evaluate = setup, book, evaluate
        self.config, self.plan = setup.config, setup.plan
        config, source = self.config, setup.prompts
        if source is None:
            raise UsageError("there is no train_dataset; give one to GRPOTrainer")
        self.source = source
        data_seed = config.seed if config.data_seed is None else config.data_seed
        size = None if source.streamed else source.size
        self.order = PromptOrder(size, data_seed, config.shuffle_dataset, self.plan.prompts_per_generation)
        if size is not None:
            _tell_of_batches(size, self.plan.prompts_per_generation, config.shuffle_dataset)
        self.stream = Stream(config.seed)
        self.total = total_steps(config, self.plan, source.size)
        self.scheduler = setup.own_scheduler
        if self.scheduler is None:
            self.scheduler = make_schedule(setup.optimizer, config, self.total)
        self.collector = Collector(setup.player, source, self.order, config, self.stream, setup.functions.advantage)
        self.follows = setup.policy.reference if config.sync_ref_model else None
        self.keeps_reference = self.follows is not None
        """Whether checkpoints hold the reference: from the first on, so that a run may go back to before it moved."""
        self.control = EntropyControl.of(config)
        self.samples: Samples | None = None
        self.steps: list[Step] = []
        self.update = 0
        """Optimizer steps taken on the samples at hand."""
        done = 0
        if resumed is not None:
            with taking_up(resumed.file):
                done = int(resumed.meta["book"]["state"]["global_step"])
        try:
            book.begin(self.total, self._updates_per_epoch(), done, self.scheduler)
            if resumed is not None:
                with taking_up(resumed.file):
                    self._restore(resumed)
        except BaseException:
            book.close()
            raise

    def _updates_per_epoch(self) -> int | None:
        if self.source.size is None or self.source.streamed:
            return None
        return steps_per_epoch(self.plan, self.source.size)

    def go(self) -> TrainOutput:
        """Step until the end, or until a callback stops it."""
        try:
            with self.setup.parameters.written_in_place(), sleeping_when_busy():
                return self._go()
        finally:
            self.setup.player.close()
            self.book.close()

    def _go(self) -> TrainOutput:
        book = self.book
        began, first = time.perf_counter(), book.state.global_step
        book.event("on_train_begin")
        if self.config.eval_on_start and book.state.global_step == 0:
            self.evaluate()
        if book.ends_epoch_late():
            self._do_as_asked()
            book.flush()
        book.agree()
        while book.state.global_step < self.total and not book.control.should_training_stop:
            book.before_step()
            began_step = time.perf_counter()
            self.setup.parameters.check()
            self.setup.policy.check()  # callbacks and reward functions may have changed modules
            with _errors_of_step(book.state.global_step + 1):
                metrics, samples = self._step()
            metrics["step_time"] = time.perf_counter() - began_step
            book.after_step(metrics, samples)
            self._do_as_asked()
            if book.ends_epoch():
                self._do_as_asked()
            book.flush()
        with _errors_of_step(book.state.global_step):
            self.setup.check_weights()
        if self.config.load_best_model_at_end:
            best_model.load_best(self.setup, book.state)
        seconds = time.perf_counter() - began
        steps = book.state.global_step
        taken = steps - first
        metrics = {
            "train_runtime": seconds, "train_samples_per_second": taken * self.plan.samples_per_step / seconds,
            "train_steps_per_second": taken / seconds, "total_flos": 0.0,
            "train_loss": book.counters.losses / max(1, steps),
        }  # fmt: skip
        book.end(metrics)
        return TrainOutput(steps, metrics["train_loss"], {**metrics, "epoch": book.state.epoch or 0.0})

    def _do_as_asked(self) -> None:
        """Log, evaluate and save if callbacks want it."""
        with _errors_of_step(self.book.state.global_step):
            self._do()

    def _do(self) -> None:
        book = self.book
        book.agree()
        if book.control.should_log:
            book.log_steps()
        if book.control.should_evaluate:
            metrics = self.evaluate()
            if book.control.should_save or not self.config.load_best_model_at_end:  # else it could not be loaded
                best_model.note_evaluation(self.config, book.state, metrics)
        if book.control.should_save:
            self.save()
        if book.control.should_epoch_stop:
            book.control.should_epoch_stop = False
            _log.warning("a callback set should_epoch_stop: epochs are not cut short; set should_training_stop to end")
        book.agree()  # a callback may have heard of an evaluation, and stopped the training

    def _step(self) -> tuple[Metrics, Samples]:
        setup, config, book = self.setup, self.config, self.book
        metrics: Metrics = {}
        if self.samples is None or self.update == self.plan.updates_per_generation:
            self.samples, metrics = self.collector.collect(
                self.plan.prompts_per_generation, self.plan.group_size, book.state
            )
            book.state.num_input_tokens_seen = self.collector.tokens  # as in TRL: callbacks may have a budget
            self.update = 0
            self._divide()
            # Steps that come after the policy has moved need to know what it was; with dropout all that are repeated,
            # as what a pass with dropout sees is not the policy that sampled.
            again = setup.policy.log_probs.dropout and self.plan.num_iterations > 1
            for later in self.steps if again else self.steps[1:]:
                later.remember_old()
        step = self.steps[self.update % len(self.steps)]
        rate = setup.optimizer.param_groups[0]["lr"]
        metrics |= optimizer_step(
            step, setup.parameters, setup.optimizer, remember=self.plan.num_iterations > 1,
            on_gradient=lambda: book.event("on_pre_optimizer_step"), number=book.state.global_step,
            control=self.control,
        )  # fmt: skip
        book.event("on_optimizer_step")
        self.scheduler.step()
        metrics["learning_rate"] = float(rate)
        self.update += 1
        done = book.state.global_step + 1
        if self.follows is not None and done % config.ref_model_sync_steps == 0:
            self.follows.follow(config.ref_model_mixup_alpha)
            self.samples.forget_reference()
        return metrics, self.samples

    def _divide(self) -> None:
        assert self.samples is not None
        setup, samples = self.setup, self.samples
        parts = samples.steps(self.plan.steps_per_generation)
        objective = Objective.of(self.config, setup.functions.surrogate)
        self.steps = [Step(setup.policy, samples, chosen, self.config, objective) for chosen in parts]

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write ``checkpoint-STEP`` and drop the oldest ones beyond save_total_limit.

        Raises TrainingError, and leaves the older ones, if the weights are not finite.
        """
        setup, book = self.setup, self.book
        book.flush()
        setup.check_weights()
        path = book.checkpoint_path()
        ranks = setup.policy.ranks
        ranks.check_same("weights", {"their sum": setup.parameters.total()}, "they part where processors differ")
        if self.samples is not None:
            self.samples.share_known(ranks)
        state = None if self.config.save_only_model else self._state()
        sharded = setup.policy.sharded
        whole = sharded is None or sharded.sharding.whole or has_adapters(setup.model)
        checkpoint.write(path, setup.model, setup.tokenizer, state, book.state, ranks, whole=whole)
        book.after_save(path)

    def _state(self) -> Checkpoint:
        policy = self.setup.policy
        moments, optimizer_meta = optimizer_state(self.setup.optimizer)
        tensors = {f"optimizer.{name}": value for name, value in moments.items()}
        meta: dict[str, Any] = {
            "optimizer": optimizer_meta, "order": self.order.state(), "drawn": self.stream.drawn,
            "tokens": self.collector.tokens, "update": self.update, "book": self.book.to_dict(),
            "plan": asdict(self.plan),
            "config": self.config.to_dict(), "scheduler": _plain_state(self.scheduler),
            "began": self.book.began, "origin": origin.describe(self.setup), "machine": self._machine(),
        }  # fmt: skip
        if self.control is not None:
            meta["entropy_control"] = self.control.state()
        if self.keeps_reference and policy.reference is not None:
            tensors |= {f"reference.{name}": value for name, value in policy.reference.state().items()}
        if self.samples is not None and self.update < self.plan.updates_per_generation:
            buffered, meta["samples"] = checkpoint.samples_state(self.samples)
            tensors |= {f"samples.{name}": value for name, value in buffered.items()}
        return Checkpoint(tensors, meta)

    def _machine(self) -> dict[str, Any]:
        policy = self.setup.policy
        return describe_machine(
            compiled=self.config.native and kernels.available(), device=policy.device,
            transformers=transformers.__version__, learner="packed" if policy.packed else "plain",
            sampler=type(policy.sampler).__name__, precision=str(policy.precision.dtype),
        )  # fmt: skip

    def _check(self, saved: Checkpoint) -> None:
        """Raise DamagedFileError if a checkpoint lacks what each has, or has it in another shape or kind."""
        own = self._state()
        kinds = {name: own.meta[name] for name in ("optimizer", "drawn", "tokens", "update", "book")}
        kinds["book"] = {**kinds["book"], "state": {"global_step": 0, "log_history": []}}
        elsewhere = ("optimizer.", "reference.")  # in parts beside the file, or not there where settings were others
        tensors = {name: value for name, value in own.tensors.items() if not name.startswith(elsewhere)}
        check_like(saved.file, saved.tensors, saved.meta, tensors, kinds)

    def _check_moments(self, file: Path, found: dict[str, Tensor]) -> None:
        """Raise DamagedFileError if the state of AdamW is not whole; it has been compared with the parameters.

        Args:
            found: the state, in ``file`` or beside it.
        """
        moments: dict[str, Tensor] = {}
        parts = (part for group in self.setup.optimizer.param_groups for part in group["params"])
        for number, part in enumerate(parts):
            moments |= {f"{number}.exp_avg": part, f"{number}.exp_avg_sq": part, f"{number}.step": torch.tensor(0.0)}
        held_parts = {name: held(value) for name, value in found.items()}
        check_like(file, held_parts, None, {name: held(value) for name, value in moments.items()})

    def _restore(self, saved: Checkpoint) -> None:
        setup, meta = self.setup, saved.meta
        plan, saved_plan = ({**p, "world_size": None} for p in (asdict(self.plan), meta["plan"]))
        if "samples" in meta and saved_plan != plan:
            raise UsageError(
                f"the checkpoint holds half a generation, sampled as {meta['plan']}, here it is {asdict(self.plan)}; "
                "resume with the same batch settings, or from a checkpoint between two generations"
            )
        self._check(saved)
        own = setup.own_scheduler is not None
        rates = [] if own else list(self.scheduler.base_lrs)
        moments = saved.part("optimizer", stepped_by(setup.optimizer))
        try:
            load_optimizer_state(setup.optimizer, moments, meta["optimizer"], own_settings=setup.default_optimizer)
        except ValueError as error:
            raise UsageError(f"the checkpoint was written with another optimizer: {error}") from error
        if setup.default_optimizer:
            self._check_moments(saved.file, moments)
        self.scheduler.load_state_dict(_with_keys_of(self.scheduler.state_dict(), meta["scheduler"]))
        if not own:
            follow_settings(self.scheduler, rates)
        others = other_machine(meta["machine"], self._machine())
        if others is not None:
            _log.warning("numbers will differ from those of a run that never stopped: %s", others)
        origin.tell_changes(meta["config"], self.config)
        self.stream.drawn = meta["drawn"]
        self.order.load(meta["order"])
        self.collector.tokens, self.update = meta["tokens"], meta["update"]
        if self.control is not None and "entropy_control" in meta:
            self.control.load(meta["entropy_control"])
        reference = setup.policy.reference
        kept = {} if reference is None else saved.part("reference", reference.state().get)
        if kept and reference is not None:
            reference.load(kept)
            self.keeps_reference = True
        if "samples" in meta:
            self.samples = checkpoint.load_samples(saved.part("samples"), meta["samples"], self.source)
            self._divide()
        self.book.began = meta["began"]
        self.book.load(meta["book"], self.samples)


@contextmanager
def _errors_of_step(step: int) -> Iterator[None]:
    """Say in TrainingErrors in which step they happened."""
    try:
        yield
    except TrainingError as error:
        if f"step {step}: " in str(error):  # another process has said it
            raise
        raise TrainingError(f"step {step}: {error}") from error


def _tell_of_batches(rows: int, batch: int, shuffled: bool) -> None:
    """Say what becomes of rows that do not divide into batches, where it is not what one would think."""
    if batch > rows:
        _log.warning("a generation takes %d prompts and the dataset has %d: some are in it more than once", batch, rows)
    elif rows % batch and not shuffled:
        _log.warning(
            "of %d prompts in the order of the dataset the last %d fill no generation and are never used; with "
            "shuffle_dataset=True they are others in each epoch", rows, rows % batch,
        )  # fmt: skip


def _plain_state(scheduler: Any) -> dict[str, Any]:
    """A scheduler's state without the functions it was made of; those of lr_lambdas are None there already."""
    return {name: value for name, value in scheduler.state_dict().items() if not callable(value)}


def _with_keys_of(own: Any, saved: Any) -> Any:
    """A scheduler's state that was kept as JSON, whose keys are text: numbers again where ``own`` has numbers.

    MultiStepLR counts its milestones by step; SequentialLR holds the states of others in a list.
    """
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        numbers = bool(own) and all(isinstance(key, int) for key in own)
        found = {int(key) if numbers else key: _with_keys_of(own.get(key), value) for key, value in saved.items()}
        return Counter(found) if isinstance(own, Counter) else found
    if isinstance(own, list | tuple) and isinstance(saved, list) and len(own) == len(saved):
        return [_with_keys_of(*pair) for pair in zip(own, saved, strict=True)]
    return saved

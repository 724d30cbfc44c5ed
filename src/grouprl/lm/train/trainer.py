"""GRPO for causal language models, in TRL's shape: what it is given, and what it can be asked; loop.py trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from grouprl.errors import UsageError
from grouprl.lm.generate.rollout_function import RolloutPlayer
from grouprl.lm.generate.shared import SharedPlayer
from grouprl.lm.models.load import eos_token_ids
from grouprl.lm.models.save import gathered_state, save_model
from grouprl.lm.prompts import PromptSource
from grouprl.lm.rewards.call import RewardFunction
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.trl import check_arguments
from grouprl.lm.train import checkpoint, evaluation, origin
from grouprl.lm.train.acting import Acting, Judges
from grouprl.lm.train.attributes import check_assignment
from grouprl.lm.train.bookkeeper import Bookkeeper, checked_callback
from grouprl.lm.train.datasets import read_eval_prompts
from grouprl.lm.train.loop import Run, TrainOutput
from grouprl.lm.train.setup import make_setup
from grouprl.lm.train.trl_methods import ScriptMethods
from grouprl.machine.memory import renew_freed_memory, return_freed_memory, use_huge_pages
from grouprl.machine.ranks import here
from grouprl.machine.torch_defaults import torch_defaults
from grouprl.objective.user_functions import TensorFunction, UserFunctions
from grouprl.runs.files import user_path
from grouprl.runs.folder import newest_good
from grouprl.runs.state import taking_up

Judge = RewardFunction | str | Any
"""A reward function, or a reward model: its name, or itself."""


class GRPOTrainer(ScriptMethods):
    """Group Relative Policy Optimization (arXiv 2402.03300) of a causal language model.

    A TRL script runs with its import changed. What is different underneath: each prompt is read and learned from once
    per group, finished completions leave the batch, nothing is padded, and no number depends on the micro-batch.

    Args:
        model: hub id, folder, GGUF file, ``"smollm2"``, or a loaded model.
        reward_funcs: one or several reward functions, as TRL calls them; see :mod:`grouprl.lm.rewards.call`. A reward
            model may stand in the place of one: a sequence classifier with one label, or its hub id or folder; see
            :mod:`grouprl.lm.rewards.model`. Not needed where an environment gives the rewards.
        args: the configuration; default: ``GRPOConfig()``. TRL's own, as its parser of command lines makes it, is
            translated, with ``gradient_checkpointing`` left out.
        train_dataset, eval_dataset: Hugging Face datasets or lists of rows, each with a ``prompt``: text or messages.
            ``eval_dataset`` may be a mapping of several.
        processing_class: the tokenizer; default: the model's own.
        reward_processing_classes: the tokenizers of reward models, in a list with an entry for each of
            ``reward_funcs``, or the only one; default: the models' own.
        eval_reward_funcs: what judges evaluations, with weight 1 each; default: ``reward_funcs``.
        callbacks: transformers' TrainerCallbacks, objects or classes.
        optimizers: ``(optimizer, scheduler)`` over the model's parameters instead of AdamW; without a scheduler, the
            configuration's is put on the optimizer.
        peft_config: train an adapter (LoRA and others).
        ref_model: what the KL divergence is measured to, if not the model as it is now: as ``model``.
        advantage_function: an estimator of your own, in the place of ``args.advantage``:
            ``(rewards [S], lengths [N], group [N]) -> [S]``, as the functions of :mod:`grouprl.objective`.
        surrogate_function: a loss of your own per token, in the place of that of ``args.loss_type``, which still says
            how tokens are averaged: ``(logp [S], logp_old [S], advantages [S]) -> [S]``. Both:
            :mod:`grouprl.objective.user_functions`.
        tools: functions that the model may call, sync or async, each with type hints and a docstring.
        environment_factory: makes environments that the model acts in, of TRL's shape
            (:mod:`grouprl.lm.agents.tool_use`) or with text (:class:`grouprl.lm.agents.interaction.Interaction`); or
            several by name, between which the column ``environment`` of the dataset decides.
        rollout_func: samples in the place of the trainer: ``(prompts, trainer)`` to a mapping of ``prompt_ids``,
            ``completion_ids``, ``logprobs``, perhaps ``env_mask``, and further columns for reward functions.
        **others: arguments of TRL's that are none here are accepted at the value that does nothing.

    Attributes:
        state: transformers' TrainerState; ``state.log_history`` holds everything logged.

    Raises UsageError, before anything is trained, for whatever cannot work.
    """

    @torch_defaults()
    def __init__(
        self,
        model: Any,
        reward_funcs: Judge | Sequence[Judge] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        reward_processing_classes: Any = None,
        eval_reward_funcs: Judge | Sequence[Judge] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] | None = (None, None),
        peft_config: Any = None,
        ref_model: Any = None,
        advantage_function: TensorFunction | None = None,
        surrogate_function: TensorFunction | None = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
        rollout_func: Callable[..., Mapping[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        check_arguments(others)
        if getattr(args, "fsdp", False) and here().world > 1:
            return_freed_memory()
        else:
            use_huge_pages()
        setup = make_setup(
            model, Judges(reward_funcs, reward_processing_classes, eval_reward_funcs), args, train_dataset,
            eval_dataset, processing_class, optimizers=optimizers, peft_config=peft_config, ref_model=ref_model,
            functions=UserFunctions(advantage_function, surrogate_function),
            acting=Acting(tools, environment_factory, rollout_func),
        )  # fmt: skip
        ranks = setup.policy.ranks
        if ranks.world > 1:
            with ranks.telling():
                about = origin.describe(setup)
                about |= {f"data: {name}": value for name, value in (about.pop("data") or {}).items()}
                ranks.check_same("data or models", about, "give every rank the same")
        if not isinstance(callbacks, list | tuple | None):
            raise UsageError(f"callbacks={callbacks!r} must be a list of TrainerCallbacks")
        super().__init__(setup, Bookkeeper(setup, list(callbacks or [])))
        vars(self).update(
            _train_dataset=train_dataset, _eval_dataset=eval_dataset, _given=(args, _values(args)), _running=False
        )
        for player in (setup.player, setup.eval_player):
            inner = player.player if isinstance(player, SharedPlayer) else player
            if isinstance(inner, RolloutPlayer):
                inner.trainer = self
        renew_freed_memory()

    # --- training ----------------------------------------------------------------------------------------------------

    @torch_defaults()
    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train until ``max_steps`` or ``num_train_epochs``.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest good one in ``output_dir``. Training
                goes on as if it had never stopped, in the middle of a generation too.

        Raises:
            UsageError: there is no dataset or no checkpoint, or a reward function is at fault.
            TrainingError: a reward function failed or a number stopped being finite; checkpoints stay as they are.
        """
        if self.is_in_train:
            raise UsageError("this trainer is training already; a callback or reward function cannot call train again")
        self.parameters.check()
        with self.policy.ranks.telling():
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: bool | str | Path | None) -> TrainOutput:
        if any(getattr(module, "merged_adapters", None) for module in self.model.modules()):
            raise UsageError(
                "an adapter is merged into the model, so it cannot be trained; model.unmerge_adapter() first"
            )
        self._check_settings()
        run = self._begin(resume_from_checkpoint)
        vars(self)["_running"] = True
        try:
            return run.go()
        finally:
            vars(self)["_running"] = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign what is read afterwards. Raises UsageError for anything else: it would be ignored."""
        check_assignment(type(self), GRPOTrainer, name, value)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises UsageError: a trainer belongs to its process."""
        raise UsageError(
            "a trainer cannot be copied or pickled; copy its model (copy.deepcopy(trainer.model)) or save it "
            "(trainer.save_model(folder)), and make a new GRPOTrainer of that"
        )

    @property
    def is_in_train(self) -> bool:
        """Whether it is training."""
        return bool(vars(self)["_running"])

    @property
    def train_dataset(self) -> Any:
        """What is trained on. A new one holds from the next ``train`` on; raises UsageError if it cannot be used."""
        return vars(self)["_train_dataset"]

    @train_dataset.setter
    def train_dataset(self, dataset: Any) -> None:
        prompts = None if dataset is None else self.prompts(dataset, "train_dataset")
        self._change("train_dataset", dataset, prompts=prompts)

    @property
    def eval_dataset(self) -> Any:
        """What is evaluated on. A new one holds from the next ``train`` or ``evaluate`` on, and raises likewise."""
        return vars(self)["_eval_dataset"]

    @eval_dataset.setter
    def eval_dataset(self, dataset: Any) -> None:
        prompts = read_eval_prompts(self.setup.read, dataset)
        if not prompts and self.args.eval_strategy != "no":
            raise UsageError(f"eval_strategy={self.args.eval_strategy!r} needs an eval_dataset, got {dataset!r}")
        self._change("eval_dataset", dataset, eval_prompts=prompts)

    def _change(self, name: str, value: Any, **parts: Any) -> None:
        if self.is_in_train:
            raise UsageError(f"{name} cannot be changed while it is trained on; let the training end first")
        setup = replace(self.setup, **parts)
        setup.check_columns()
        self.book.setup = setup
        vars(self).update({"setup": setup, f"_{name}": value})

    def _check_settings(self) -> None:
        """Raises UsageError if settings were changed where they were made, which the trainer would not hear of."""
        self.policy.check()
        ends, now = self.policy.sampler.end_ids, eos_token_ids(self.model, self.processing_class)
        if set(ends) != set(now):
            raise UsageError(
                f"the tokens that end a completion were {sorted(ends)} when this trainer was made, which keeps them, "
                f"and the tokenizer and model.generation_config name {sorted(now)} now; make a new GRPOTrainer"
            )
        args, before = vars(self)["_given"]
        for name, now in _values(args).items():
            if now != before.get(name, now):
                raise UsageError(
                    f"args.{name} was {before[name]!r} when this trainer was made, which keeps it, and is {now!r} now; "
                    "make a new GRPOTrainer of the changed settings, or change them back"
                )

    def _begin(self, place: bool | str | Path | None) -> Run:
        if place is None or place is False:
            return Run(self.setup, self.book, self.evaluate, None)
        if place is not True:
            folder = user_path(place)
            with checkpoint.offering_another(folder):
                return self._resumed(folder)
        if self.policy.ranks.world > 1:
            newest = self.policy.ranks.once(lambda: checkpoint.latest(self.setup.output_dir))
            if newest is not None:
                return self._resumed(newest)
        folders = checkpoint.existing(self.setup.output_dir)
        found = newest_good(folders, self._resumed)
        if found is None:
            content = "no checkpoint" + (" that can be used" if folders else "")
            raise UsageError(
                f"resume_from_checkpoint=True, but {self.setup.output_dir} holds {content}; give its folder, "
                "or leave the argument out to start anew"
            )
        return found[1]

    def _resumed(self, folder: Path) -> Run:
        saved = checkpoint.read(folder)
        with taking_up(saved.file):
            made_of = saved.meta["origin"]
        origin.check(made_of, self.setup, folder)
        self.load_weights(folder)
        return Run(self.setup, self.book, self.evaluate, saved)

    def load_weights(self, folder: Path) -> None:
        """Go on with the weights saved in ``folder``, as :meth:`save_model` and checkpoints write them."""
        self.setup.load_weights(user_path(folder))

    # --- evaluation, prediction, saving ------------------------------------------------------------------------------

    @torch_defaults()
    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", *, greedy: bool = False
    ) -> dict[str, float]:
        """Mean rewards on ``eval_dataset`` (default: the trainer's), logged and returned as ``eval_reward`` and so on.

        Args:
            eval_dataset: a dataset, or the name of one of the trainer's, if the trainer has several.
            greedy: one completion per prompt of the likeliest tokens, instead of ``num_generations_eval`` sampled ones.

        The draws come from a stream of their own, the same at every evaluation: evaluating changes nothing in training.

        Raises UsageError if there is no dataset, TrainingError if a reward function fails.
        """
        with self.policy.ranks.telling():
            return self._evaluate(eval_dataset, metric_key_prefix, greedy)

    def _evaluate(self, eval_dataset: Any, metric_key_prefix: str, greedy: bool) -> dict[str, float]:
        self._check_settings()
        setup = self.setup
        sources = setup.eval_prompts
        if isinstance(eval_dataset, str) and eval_dataset in sources:
            sources = {"": sources[eval_dataset]}
        elif eval_dataset is not None:
            sources = read_eval_prompts(setup.read, eval_dataset)
            replace(setup, prompts=None, eval_prompts=sources).check_columns()
        if not sources:
            raise UsageError("there is no eval_dataset; give one to GRPOTrainer or to evaluate")
        metrics: dict[str, float] = {}
        for name, source in sources.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            numbers = evaluation.measure(setup, source, greedy=greedy, state=self.state)
            metrics |= {f"{prefix}_{key}": value for key, value in numbers.items()}
        self.book.after_evaluation(metrics)
        return metrics

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the model as a plain Hugging Face folder (or PEFT adapter folder).

        Of several processes the first writes, and the others do not wait for it. So it may be called in all of them or
        in the first alone. Weights that ``fsdp`` shards are gathered: then all processes must call it.

        Args:
            output_dir: default: ``args.output_dir``, beside the checkpoints, as transformers does.

        Raises:
            UsageError: the place cannot be written.
            TrainingError: the disk is full, or trained weights are not finite: an older model stays as it is.
        """
        ranks = self.policy.ranks
        if self.policy.sharded is None:
            self.setup.check_finite()
            if ranks.first:
                self._save_model(output_dir, None)
            return
        with ranks.telling():
            self.setup.check_finite()
            ranks.gather(None, "save the model")
            state = gathered_state(self.model, first=ranks.first)
            ranks.once(lambda: self._save_model(output_dir, state))

    def _save_model(self, output_dir: str | Path | None, state: dict[str, Tensor] | None) -> None:
        place = self.setup.output_dir if output_dir is None else user_path(output_dir)
        if place.absolute() == self.setup.output_dir.absolute():
            checkpoint.write_beside(place, self.model, self.processing_class, state)
        else:
            save_model(self.model, self.processing_class, place, state=state)

    def add_callback(self, callback: Any) -> None:
        """Tell one more TrainerCallback (object or class) of what happens."""
        self.callback_handler.add_callback(checked_callback(callback))

    def remove_callback(self, callback: Any) -> None:
        """Tell a TrainerCallback (object, or class: the first of it) nothing more; nothing happens if there is none."""
        self.pop_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """:meth:`remove_callback`, and return it, or None."""
        handler = self.callback_handler
        for listener in handler.callbacks:
            if listener is callback or (isinstance(callback, type) and isinstance(listener, callback)):
                handler.callbacks.remove(listener)
                return listener
        return None

    def prompts(self, dataset: Any, name: str) -> PromptSource:
        """The prompts of a dataset, as this model reads them. Raises UsageError if it cannot be used."""
        return self.setup.read(dataset, name)


def _values(args: Any) -> dict[str, Any]:
    """The settings as they are now, of grouprl's configuration or of TRL's."""
    if args is None:
        return {}
    return dict(args) if isinstance(args, GRPOConfig) else dict(args.to_dict())

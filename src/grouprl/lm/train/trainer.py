"""GRPO for causal language models, in TRL's shape: what it is given, and what it can be asked; loop.py trains."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grouprl.errors import UsageError, first_line
from grouprl.lm.generate.collect import Metrics, describe_scored, sample_and_score
from grouprl.lm.generate.samples import Samples
from grouprl.lm.learn.parameters import MasterParameters, make_optimizer
from grouprl.lm.models.load import load
from grouprl.lm.models.save import load_weights, save_model
from grouprl.lm.policy.policy import Policy, sampling_settings
from grouprl.lm.prompts import PromptSource, prepare_prompts
from grouprl.lm.rewards.call import RewardCaller, RewardFunction
from grouprl.lm.settings.batch_plan import batch_plan
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.trl import check_arguments
from grouprl.lm.settings.user_functions import Custom
from grouprl.lm.train import checkpoint
from grouprl.lm.train.callbacks import Flow
from grouprl.lm.train.checkpoint import Checkpoint
from grouprl.lm.train.loop import Run, TrainOutput
from grouprl.lm.train.trl_methods import ScriptMethods
from grouprl.machine.memory import renew_freed_memory, use_huge_pages
from grouprl.objective.user_functions import TensorFunction


class GRPOTrainer(ScriptMethods):
    """Group Relative Policy Optimization (arXiv 2402.03300) of a causal language model.

    A TRL script runs with its import changed. What is different underneath: each prompt is read and learned from once
    per group, finished completions leave the batch, nothing is padded, and no number depends on the micro-batch.

    Args:
        model: hub id, folder, GGUF file, ``"smollm2"``, or a loaded model.
        reward_funcs: one or several reward functions, as TRL calls them; see :mod:`grouprl.lm.rewards.call`.
        args: the configuration; default: ``GRPOConfig()``. TRL's own, as its parser of command lines makes it, is
            translated, with ``gradient_checkpointing`` left out.
        train_dataset, eval_dataset: Hugging Face datasets or lists of rows, each with a ``prompt``: text or messages.
            ``eval_dataset`` may be a mapping of several.
        processing_class: the tokenizer; default: the model's own.
        callbacks: transformers' TrainerCallbacks, objects or classes.
        optimizers: ``(optimizer, scheduler)`` over the model's parameters instead of AdamW; without a scheduler, the
            configuration's is put on the optimizer.
        peft_config: train an adapter (LoRA and others).
        ref_model: what the KL divergence is measured to, if not the model as it is now: as ``model``.
        advantage_function: an estimator of your own, in the place of ``args.advantage``:
            ``(rewards [S], lengths [N], group [N]) -> [S]``, as the functions of :mod:`grouprl.objective`.
        surrogate_function: a loss of your own per token, in the place of that of ``args.loss_type``, which still says
            how tokens are averaged: ``(logp [S], logp_old [S], advantages [S]) -> [S]``. Both:
            :mod:`grouprl.lm.settings.user_functions`.
        **others: arguments of TRL's that are none here are accepted at the value that does nothing.

    Attributes:
        state: transformers' TrainerState; ``state.log_history`` holds everything logged.

    Raises UsageError, before anything is trained, for whatever cannot work.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] | None = (None, None),
        peft_config: Any = None,
        ref_model: Any = None,
        advantage_function: TensorFunction | None = None,
        surrogate_function: TensorFunction | None = None,
        **others: Any,
    ) -> None:
        check_arguments(others)
        use_huge_pages()
        self.args = config = _configuration(args)
        self.custom = Custom(advantage_function, surrogate_function)
        self.plan = batch_plan(config)
        self.rewards = RewardCaller(reward_funcs, config.reward_weights)
        torch.manual_seed(config.seed)
        self.model, self.processing_class = _prepare_model(model, processing_class, config, peft_config)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._source = None if train_dataset is None else self.prompts(train_dataset, "train_dataset")
        self._eval_sources = self._evaluation_prompts(eval_dataset)
        if not self._eval_sources and (config.eval_strategy != "no" or config.eval_on_start):
            what = "eval_on_start=True" if config.eval_strategy == "no" else f"eval_strategy={config.eval_strategy!r}"
            raise UsageError(f"{what} needs an eval_dataset; give one to GRPOTrainer, or leave the setting out")
        self.parameters = MasterParameters(self.model)
        if isinstance(ref_model, str | Path):
            ref_model, _ = load(ref_model, tokenizer=self.processing_class, dtype=config.master_dtype)
        self.policy = Policy(self.model, self.processing_class, config, ref_model)
        self.optimizer: Any
        self.lr_scheduler: Any
        self.optimizer, self.lr_scheduler = optimizers or (None, None)
        self._own_optimizer, self._own_scheduler = self.optimizer is None, self.lr_scheduler is None
        if self.optimizer is None:
            if self.lr_scheduler is not None:
                raise UsageError("optimizers holds a scheduler without the optimizer it steps; give both, or neither")
            self.optimizer = make_optimizer(self.parameters, config)
        else:
            _check_optimizer(self.optimizer, self.parameters)
        if not isinstance(callbacks, list | tuple | None):
            raise UsageError(f"callbacks={callbacks!r} must be a list of TrainerCallbacks")
        self.flow = Flow(self, list(callbacks or []))
        renew_freed_memory()
        self.last_samples: Samples | None = None
        """What the last optimizer step learned from (its whole generation)."""

    @property
    def state(self) -> Any:
        """transformers' TrainerState."""
        return self.flow.state

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train until ``max_steps`` or ``num_train_epochs``.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest in ``output_dir``. Training goes on as
                if it had never stopped, in the middle of a generation too.

        Raises:
            UsageError: there is no dataset or no checkpoint, or a reward function is at fault.
            TrainingError: a reward function failed or a number stopped being finite; checkpoints stay as they are.
        """
        run = Run(self, self._checkpoint_to_resume(resume_from_checkpoint))
        return run.go()

    def _checkpoint_to_resume(self, wanted: bool | str | Path | None) -> Checkpoint | None:
        if wanted is None or wanted is False:
            return None
        if wanted is True:
            newest = checkpoint.latest(self.flow.output_dir)
            if newest is None:
                raise UsageError(
                    f"resume_from_checkpoint=True, but {self.flow.output_dir} holds no checkpoint; give its folder, or "
                    "leave the argument out to start anew"
                )
            wanted = newest
        found = checkpoint.read(Path(wanted))
        self.load_weights(Path(wanted))
        return found

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Go on with the weights saved in ``folder``, as :meth:`save_model` and checkpoints write them."""
        load_weights(self.model, folder)

    # --- evaluation, prediction, saving ------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", *, greedy: bool = False
    ) -> dict[str, float]:
        """Mean rewards on ``eval_dataset`` (default: the trainer's), logged and returned as ``eval_reward`` and so on.

        Args:
            greedy: one completion per prompt of the likeliest tokens, instead of ``num_generations_eval`` sampled ones.

        The draws come from a stream of their own, the same at every evaluation: evaluating changes nothing in training.

        Raises UsageError if there is no dataset, TrainingError if a reward function fails.
        """
        sources = self._eval_sources if eval_dataset is None else self._evaluation_prompts(eval_dataset)
        if not sources:
            raise UsageError("there is no eval_dataset; give one to GRPOTrainer or to evaluate")
        metrics: dict[str, float] = {}
        for name, source in sources.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            metrics |= {f"{prefix}_{key}": value for key, value in self._evaluate(source, greedy).items()}
        self.flow.evaluated(metrics)
        return metrics

    def _evaluate(self, source: PromptSource, greedy: bool) -> Metrics:
        config, began = self.args, time.perf_counter()
        assert source.size is not None
        group_size = 1 if greedy else config.num_generations_eval or config.num_generations
        generator = torch.Generator().manual_seed(config.seed)
        settings = sampling_settings(config, greedy=greedy)
        at_once = max(1, (config.per_device_eval_batch_size or source.size * group_size) // group_size)
        parts = [
            sample_and_score(
                self.policy, self.processing_class, self.rewards,
                [source[i] for i in range(start, min(start + at_once, source.size))], group_size, generator, settings,
                self.state,
            )
            for start in range(0, source.size, at_once)
        ]  # fmt: skip
        metrics = describe_scored(parts)
        seconds = time.perf_counter() - began
        return {**metrics, "runtime": seconds, "samples_per_second": source.size * group_size / seconds}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the model as a plain Hugging Face folder (or PEFT adapter folder).

        Args:
            output_dir: default: ``args.output_dir``, beside the checkpoints, as transformers does.

        Raises UsageError if the place cannot be written, TrainingError if the disk is full.
        """
        place = self.flow.output_dir if output_dir is None else Path(output_dir)
        if place.absolute() == self.flow.output_dir.absolute():
            checkpoint.write_beside(place, self.model, self.processing_class)
        else:
            save_model(self.model, self.processing_class, place)

    def add_callback(self, callback: Any) -> None:
        """Tell one more TrainerCallback (object or class) of what happens."""
        self.flow.handler.add_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Tell a TrainerCallback (object, or class: the first of it) nothing more; nothing happens if there is none."""
        self.pop_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """:meth:`remove_callback`, and return it, or None."""
        handler = self.flow.handler
        kind = callback if isinstance(callback, type) else None
        for known in handler.callbacks:
            if known is callback or (kind is not None and isinstance(known, kind)):
                handler.callbacks.remove(known)
                return known
        return None

    def prompts(self, dataset: Any, name: str) -> PromptSource:
        """The prompts of a dataset, as this model reads them. Raises UsageError if it cannot be used."""
        config = self.args
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return prepare_prompts(
            dataset, self.processing_class, chat_template_kwargs=config.chat_template_kwargs, context_length=context,
            max_completion_length=config.max_completion_length, name=name,
        )  # fmt: skip

    def _evaluation_prompts(self, dataset: Any) -> dict[str, PromptSource]:
        if dataset is None:
            return {}
        if isinstance(dataset, dict) and "prompt" not in dataset:
            return {name: self.prompts(_whole(part), f"eval_dataset[{name!r}]") for name, part in dataset.items()}
        return {"": self.prompts(_whole(dataset), "eval_dataset")}


_MOST_ROWS = 1_000_000


def _whole(dataset: Any) -> Any:
    """A stream read to its end, as an evaluation needs all of it; anything else as it is."""
    streamed = isinstance(dataset, Iterable) and not hasattr(dataset, "__len__") and not isinstance(dataset, Iterator)
    if not streamed:
        return dataset
    rows = list(itertools.islice(dataset, _MOST_ROWS + 1))
    if len(rows) > _MOST_ROWS:
        raise UsageError(f"eval_dataset is a stream of more than {_MOST_ROWS} rows; give dataset.take(n)")
    return rows


_RECOMPUTATION = ("gradient_checkpointing", "activation_checkpointing")


def _configuration(args: Any) -> GRPOConfig:
    if args is None:
        args = GRPOConfig()
    if type(args).__module__.startswith("trl.") and hasattr(args, "to_dict"):
        given = args.to_dict()  # TRL's own; its default for this one costs time and changes no number
        args = GRPOConfig(**{k: v for k, v in given.items() if k.removesuffix("_kwargs") not in _RECOMPUTATION})
    if not isinstance(args, GRPOConfig):
        raise UsageError(
            f"args is a {type(args).__module__}.{type(args).__name__}; give a grouprl.lm.GRPOConfig, which takes the "
            "same settings" + (": GRPOConfig(**args.to_dict())" if hasattr(args, "to_dict") else "")
        )
    return args.in_use()


def _check_optimizer(optimizer: Any, parameters: MasterParameters) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"optimizers holds {optimizer!r}, which is no optimizer; give torch.optim.SGD(...) or the like"
        )
    own = {id(parameter) for parameter in parameters.tensors}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            "the optimizer holds no parameter that is trained here; make it of the parameters of the very model that "
            "is given, and with an adapter of the model that get_peft_model returns"
        )


def _prepare_model(model: Any, tokenizer: Any, config: GRPOConfig, peft_config: Any) -> tuple[Any, Any]:
    """The model on its device, with adapter and frozen embeddings as asked for, and the tokenizer."""
    options: dict[str, Any] = {} if not isinstance(model, str | Path) else {"dtype": config.master_dtype}
    loaded: Any
    loaded, tokenizer = load(model, tokenizer=tokenizer, model_init_kwargs=config.model_init_kwargs, **options)
    if peft_config is not None:
        if hasattr(loaded, "peft_config"):
            raise UsageError(
                "the model has an adapter already, and peft_config asks for another; leave peft_config out to train "
                "that one, or give model.merge_and_unload()"
            )
        if isinstance(peft_config, Mapping):
            raise UsageError("peft_config is a mapping; give peft.LoraConfig(...) or another configuration of PEFT's")
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise UsageError("peft_config needs PEFT: pip install 'grouprl[lm]'") from error
        try:
            loaded = get_peft_model(loaded, peft_config)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"peft_config does not fit the model: {first_line(error)}") from error
    loaded = loaded.to(config.device)
    if config.freeze_embeddings:
        loaded.get_input_embeddings().weight.requires_grad_(False)
    return loaded, tokenizer

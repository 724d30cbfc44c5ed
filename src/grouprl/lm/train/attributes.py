"""What scripts read of a trainer under the names of TRL's, and what becomes of a value that they assign to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grouprl.errors import UsageError, shown
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.trl import FOREIGN, FOREIGN_ARGUMENTS, RENAMED, TRAINER_ARGUMENTS

_HUB = "upload when training is done: trainer.model.push_to_hub(name) and trainer.processing_class.push_to_hub(name)"
OWN_LOOP = "the training loop is grouprl.lm.train.loop.Run; a callback is told of every step"
_LOGS = "trainer.state.log_history holds what was logged, trainer.last_samples the completions"
_SAMPLING = "trainer.policy.sample samples as in training, by vLLM where use_vllm says so"

MISSING = {
    "push_to_hub": _HUB,
    "init_hf_repo": _HUB,
    "predict": "evaluate(dataset) judges its completions, and trainer.policy.sample gives them",
    "hyperparameter_search": "train once per setting",
    "get_train_dataloader": OWN_LOOP,
    "get_eval_dataloader": OWN_LOOP,
    "training_step": OWN_LOOP,
    "compute_loss": "the loss is grouprl.objective.policy_loss; loss_type, advantage or surrogate_function choose it",
    "create_optimizer": "pass optimizers=(optimizer, scheduler)",
    "create_scheduler": "pass optimizers=(optimizer, scheduler)",
    "log": "log_metric, which reward functions are given, logs a number",
    "_metrics": _LOGS,
    "_logs": _LOGS,
    "_textual_logs": _LOGS,
    "generation_config": "trainer.args holds the settings of sampling",
    "environments": "environments are made as episodes need them; reward functions are given theirs as `environments`",
    "environment_factories": "keep environment_factory, which you gave to GRPOTrainer, in a variable of your own",
    "tools": "keep the list of tools, which you gave to GRPOTrainer, in a variable of your own",
    "rollout_func": "keep rollout_func, which you gave to GRPOTrainer, in a variable of your own",
    "llm": _SAMPLING,
    "vllm_generation": _SAMPLING,
    "_step": "trainer.state.global_step counts optimizer steps; micro-batches have no number",
    "_buffered_inputs": "trainer.last_samples holds what the last step learned from",
}
"""Methods and attributes of transformers' and TRL's trainers that do not exist here, and what to do instead."""

INNER = {
    "_compute_loss",
    "_generate",
    "_generate_single_turn",
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_prepare_inputs",
    "_get_train_sampler",
    "_get_eval_sampler",
    "_save",
    "_save_checkpoint",
    "_inner_training_loop",
    "_get_per_token_logps_and_entropies",
    "prediction_step",
    "create_optimizer_and_scheduler",
}
"""What subclasses of TRL's trainer override besides."""

FOR_CALLERS = {"push_to_hub", "init_hf_repo", "predict", "hyperparameter_search"}
"""Those of them that a script calls itself, and no subclass overrides."""


def _nothing(trainer: Any) -> None:
    return None


def _reference_model(trainer: Any) -> Any:
    if trainer.policy.reference is None:
        return None
    raise AttributeError(
        "the reference has no model of its own: trainer.policy.reference holds its weights and computes log_probs"
    )


ALIASES: Mapping[str, Callable[[Any], Any]] = {
    "tokenizer": lambda t: t.processing_class,
    "model_wrapped": lambda t: t.model,
    "reward_funcs": lambda t: list(t.rewards.functions),
    "reward_func_names": lambda t: list(t.rewards.names),
    "reward_weights": lambda t: t.rewards.weights,
    "reward_processing_classes": lambda t: [getattr(function, "tokenizer", None) for function in t.rewards.functions],
    "ref_model": _reference_model,
    "epsilon_low": lambda t: t.args.epsilon,
    "epsilon_high": lambda t: t.args.epsilon if t.args.epsilon_high is None else t.args.epsilon_high,
    "eos_token_id": lambda t: t.processing_class.eos_token_id,
    "pad_token_id": lambda t: t.processing_class.pad_token_id,
    "eos_token_ids": lambda t: sorted(t.policy.sampler.end_ids),
    "aux_loss_enabled": lambda t: t.policy.log_probs.experts is not None,
    "_tokenizer": lambda t: t.processing_class,
    "_total_train_tokens": lambda t: t.state.num_input_tokens_seen,
    "pad_token": lambda t: t.processing_class.pad_token,
    "data_collator": _nothing,
    "compute_metrics": _nothing,
    "compute_loss_func": _nothing,
    "preprocess_logits_for_metrics": _nothing,
}
"""Attributes of TRL's and transformers' trainers, and what they are here."""

_INSTEAD = {
    "optimizer": "pass optimizers=(optimizer, scheduler) to a new GRPOTrainer",
    "lr_scheduler": "pass optimizers=(optimizer, scheduler) to a new GRPOTrainer",
    "callback_handler": "use add_callback and remove_callback",
    "state": "change its fields, or train with resume_from_checkpoint",
    "control": "set its fields in a callback",
    "reward_funcs": "give them to a new GRPOTrainer",
}


def is_setting(name: str) -> bool:
    """Whether ``name`` is an attribute of the configuration, such as ``beta``."""
    return name in GRPOConfig.model_fields or name in RENAMED or name in FOREIGN


PARTS = (
    "setup", "book", "args", "plan", "functions", "model", "processing_class", "policy", "parameters", "rewards",
    "optimizer",
)  # fmt: skip
"""What a trainer holds, once and for all."""


def check_assignment(kind: type, base: type, name: str, value: Any) -> None:
    """Raises UsageError if nothing would read ``value`` after ``trainer.name = value``.

    Subclasses may keep what they like under names that mean nothing to TRL, transformers and grouprl, or that they
    declare themselves; and a method may be replaced, as by a test.

    Args:
        kind: the trainer's class. base: that of grouprl which it is or extends.
    """
    for subclass in kind.__mro__[: kind.__mro__.index(base)]:
        if name in vars(subclass) or name in vars(subclass).get("__annotations__", ()):
            return
    there = getattr(base, name, None)
    if there is not None and (there.fset is not None if isinstance(there, property) else callable(there)):
        return
    taken = isinstance(there, property) or name in PARTS or name in ALIASES or name in MISSING or name in INNER
    foreign = is_setting(name) or name in TRAINER_ARGUMENTS or name in FOREIGN_ARGUMENTS
    if not taken and not foreign and (kind is not base or name.startswith("_")):
        return
    advice = _INSTEAD.get(name) or MISSING.get(name)
    if advice is None and is_setting(name):
        advice = f"settings are fixed when a trainer is made; give a new one GRPOConfig({name}=...)"
    raise UsageError(
        f"trainer.{name} = {shown(value)} would change nothing: "
        + (advice or "nothing reads it; make a new GRPOTrainer of what is to change, or a subclass for what is yours")
    )

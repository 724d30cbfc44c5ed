"""Settings of language models that another setting, or an argument of the trainer, leaves without effect."""

from __future__ import annotations

from grouprl.lm.settings.fields import Fields
from grouprl.settings.unread import OF_DISCOUNT, OF_LOSS, OF_SCALE, Unread

_FIELDS = tuple(Fields.model_fields)
_VLLM = tuple(name for name in _FIELDS if name.startswith("vllm_"))
_SERVER = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout")
_HERE = ("vllm_gpu_memory_utilization", "vllm_max_model_length")
_CORRECTION = tuple(
    name for name in _FIELDS if name.startswith(("vllm_importance_sampling_mode", "vllm_importance_sampling_clip"))
)
_OPTIMIZER = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate")
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")

RULES: tuple[Unread, ...] = (
    *OF_LOSS,
    Unread(
        ("kl_estimator", "kl_in"), lambda c, _: c.beta == 0,
        "beta=0 gives the divergence to a reference no weight; set beta, or leave it out",
    ),
    Unread(
        ("ref_model_mixup_alpha", "ref_model_sync_steps"), lambda c, _: not c.sync_ref_model,
        "the reference stays as it is; set sync_ref_model=True, or leave it out",
    ),
    Unread(
        ("entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"),
        lambda c, _: not c.use_adaptive_entropy,
        "the weight of the entropy bonus is constant; set use_adaptive_entropy=True, or leave it out",
    ),
    Unread(
        ("dynamic_sampling_max_batches",), lambda c, _: not c.dynamic_sampling,
        "no group is replaced; set dynamic_sampling=True, or leave it out",
    ),
    Unread(
        ("scale_rewards", "gigpo_weight", "pass_k", "multi_objective_aggregation"),
        lambda c, about: about["own_advantage"],  # it may ask for gamma
        "advantage_function computes the advantages; leave one of the two out",
    ),
    Unread(
        ("advantage",),
        lambda c, about: about["own_advantage"] and c.num_generations > 1,  # it says whether one completion will do
        "advantage_function computes the advantages; leave one of the two out",
    ),
    OF_SCALE,
    Unread(
        (
            "max_turns", "max_turn_length", "max_tool_calling_iterations", "history", "tool_timeout", "max_tool_output",
            "gamma",
        ),
        lambda c, about: not about["episodes"],
        "a completion is one turn; it is for tools and environments",
    ),
    OF_DISCOUNT,
    Unread(
        _OPTIMIZER, lambda c, about: about["own_optimizer"], "optimizers holds an optimizer of your own; set it there",
    ),
    Unread(
        _SCHEDULE, lambda c, about: about["own_schedule"], "optimizers holds a schedule of your own; set it there",
    ),
    Unread(
        ("warmup_steps",), lambda c, _: c.lr_scheduler_type == "constant",
        "lr_scheduler_type='constant' has no warmup; set 'constant_with_warmup', or leave it out",
    ),
    Unread(
        ("lr_scheduler_kwargs",), lambda c, _: c.lr_scheduler_type in ("constant", "constant_with_warmup"),
        "the schedule that lr_scheduler_type names takes no further arguments; leave it out",
    ),
    Unread(
        ("num_train_epochs",), lambda c, _: c.max_steps > 0,
        "max_steps says how long the run is; leave one of them out",
    ),
    Unread(
        ("data_seed",), lambda c, _: not c.shuffle_dataset, "shuffle_dataset=False keeps the order of the dataset",
    ),
    Unread(
        ("data_seed",), lambda c, about: about["streamed"],
        "the rows of a stream come in its own order; shuffle the stream itself, or leave it out",
    ),
    Unread(
        ("master_dtype",), lambda c, about: about["other_dtype"],
        "no weight of the given model has that type; load it with this dtype, or leave it out",
    ),
    Unread(
        ("eval_steps",), lambda c, _: c.eval_strategy != "steps",
        "it says how often with eval_strategy='steps'; set that, or leave it out",
    ),
    Unread(
        ("save_steps",), lambda c, _: c.save_strategy != "steps",
        "it says how often with save_strategy='steps'; set that, or leave it out",
    ),
    Unread(
        ("logging_steps",),
        lambda c, _: c.logging_strategy != "steps" and (c.eval_strategy != "steps" or c.eval_steps is not None),
        "it says how often with logging_strategy='steps'; set that, or leave it out",
    ),
    Unread(
        ("greater_is_better",), lambda c, _: c.metric_for_best_model is None and not c.load_best_model_at_end,
        "no metric says which model is best; set metric_for_best_model, or leave it out",
    ),
    Unread(
        ("num_completions_to_print",), lambda c, _: not c.log_completions,
        "no completions are printed; set log_completions=True, or leave it out",
    ),
    Unread(
        ("transcripts",), lambda c, _: not c.log_completions,
        "no transcripts are written; set log_completions=True, or leave it out",
    ),
    Unread(
        ("gradient_checkpointing_kwargs",), lambda c, _: not (c.gradient_checkpointing or c.fsdp),
        "nothing is recomputed; set gradient_checkpointing=True, or leave it out",
    ),
    Unread(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda c, _: "trackio" not in c.report_to, "trackio is no tracker of this run; add it to report_to",
    ),
    Unread(_VLLM, lambda c, _: not c.use_vllm, "the built-in sampler samples; set use_vllm=True, or leave it out"),
    Unread(_SERVER, lambda c, _: c.vllm_mode != "server", "vLLM runs in this process; set vllm_mode='server'"),
    Unread(_HERE, lambda c, _: c.vllm_mode == "server", "a server decides it when it is started"),
    Unread(
        _CORRECTION, lambda c, _: not c.vllm_importance_sampling_correction,
        "vllm_importance_sampling_correction=False corrects nothing; leave one of them out",
    ),
)  # fmt: skip
"""All of them. They know, beside the settings: ``episodes``, whether the model acts in several turns;
``own_optimizer``, ``own_schedule``, ``own_advantage`` and ``own_surrogate``, whether it was given; ``streamed``,
whether the prompts of training come from a stream; ``other_dtype``, whether ``master_dtype`` is that of no weight.
"""

"""What TRL's GRPOConfig and GRPOTrainer and transformers' TrainingArguments take and we do not: what becomes of it.

An option given at the value that changes nothing is accepted, so that a configuration written for TRL can be used as it
is. A value that says only where or how fast is left out with a warning. Any other value is refused by name, with what
to do instead. Checked against TRL 1.16 and transformers 5.23.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Any, NamedTuple

from grouprl.errors import refuse, shown
from grouprl.lm.settings.other_libraries import ELSEWHERE
from grouprl.machine.ranks import Place
from grouprl.settings.names import unknown_setting

_log = logging.getLogger("grouprl")


class Foreign(NamedTuple):
    """An option that is no setting here."""

    off: Any
    """The value that changes nothing, which is also what the configuration reads as."""
    advice: str = ""
    """What to do instead of any other value; empty if no value could change a number here, so that all are accepted."""
    also_off: tuple[Any, ...] = ()
    warned: tuple[Any, ...] | None = ()
    """Further values that change only where or how fast, and are left out with a warning; None for all of them."""


GENERATION = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens", "max_completion_length",
    "stop_strings",
)  # fmt: skip
"""What generation_kwargs may hold."""
_OF_GENERATION = {"max_new_tokens": "max_completion_length", "stop": "stop_strings"}
"""What some of it is called there."""

_END = "; the model's generation_config.eos_token_id is heard, and may hold several tokens that end a completion"
_ENDS = dict.fromkeys(("stop_token_ids", "eos_token_id", "forced_eos_token_id"), _END)
"""What to use in the place of options that end a completion."""

RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of the run there too
}

OF_PROCESS: dict[str, Callable[[Place], Any]] = {
    "world_size": lambda place: place.world,
    "process_index": lambda place: place.rank,
    "local_process_index": lambda place: place.local,
    "should_save": lambda place: place.rank == 0,
    "should_log": lambda place: place.rank == 0,
    "parallel_mode": lambda place: "distributed" if place.world > 1 else "not_parallel",
    "local_rank": lambda place: place.local if place.world > 1 else -1,
}
"""What transformers' callbacks read of a configuration, and depends on the process."""

TRAINER_ARGUMENTS = (
    "model", "reward_funcs", "reward_processing_classes", "eval_reward_funcs", "train_dataset", "eval_dataset",
    "processing_class", "peft_config", "callbacks",
    "optimizers", "ref_model", "advantage_function", "surrogate_function", "tools", "environment_factory",
    "rollout_func",
)  # fmt: skip

_VLLM = "vLLM samples with its own model, awake and freely; leave it out"
_ITS_SPEED = "the sampler is built in, and has its own cache and order of work"
_HUB = "upload when training is done, with model.push_to_hub; leave it out"
_PACKED = "completions are packed without padding"
_LAUNCH = "start several processes by torchrun to share the work, and set fsdp=True to shard the weights; leave it out"
_NOISE = "not offered; leave it out"
_COMPILE = "the layers are compiled where that is possible"
_PRECISION = "set bf16=True for low precision; leave it out"
_FLOAT32_HEAD = "log-probabilities are always computed in float32; leave it out"
_DETERMINISM = "call transformers.enable_full_determinism(seed) before training; leave it out"
_ORDER = "set shuffle_dataset=False for the order of the dataset; leave it out"
_CALLBACKS = "callbacks begin anew when a run is resumed; leave it out"
_FULL_EVAL = "evaluation runs in the precision of training; leave it out"
_LIGER = "log-probabilities never hold the whole vocabulary of a batch"

_FOREIGN_GROUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    (_VLLM, {"vllm_model_impl": "vllm", "vllm_enable_sleep_mode": False, "vllm_structured_outputs_regex": None}),
    (_HUB, {
        "push_to_hub": False, "hub_token": None, "hub_private_repo": None, "hub_model_id": None,
        "hub_strategy": "every_save", "hub_always_push": False, "hub_revision": None, "log_completions_hub_repo": None,
    }),
    (_LAUNCH, {"deepspeed": None, "parallelism_config": None}),
    (_NOISE, {"neftune_noise_alpha": None, "label_smoothing_factor": 0.0, "enable_jit_checkpoint": False}),
    (_PRECISION, {"fp16": False, "tf32": None}),
    (_FULL_EVAL, {"bf16_full_eval": False, "fp16_full_eval": False}),
    (_CALLBACKS, {"restore_callback_states_from_checkpoint": False}),
    (_ORDER, {"train_sampling_strategy": "random", "group_by_length": False, "length_column_name": "length"}),
    ("", {
        "accelerator_config": None, "ds3_gather_for_generation": True, "log_multimodal": True,
        "prediction_loss_only": False, "skip_memory_metrics": True, "log_level": "passive",
        "log_level_replica": "warning", "log_on_each_node": True,
        "logging_nan_inf_filter": True, "average_tokens_across_devices": True, "include_num_input_tokens_seen": "no",
        "use_cache": False, "torch_empty_cache_steps": None, "save_on_each_node": False,
        "eval_do_concat_batches": True,
        "eval_use_gather_object": False, "eval_accumulation_steps": None, "batch_eval_metrics": False,
        "include_for_metrics": [], "label_names": None, "dataloader_drop_last": False, "dataloader_num_workers": 0,
        "dataloader_pin_memory": True, "dataloader_persistent_workers": False, "dataloader_prefetch_factor": None,
        "dataloader_multiprocessing_context": None, "dataloader_in_order": True, "ddp_find_unused_parameters": None,
        "ddp_bucket_cap_mb": None, "ddp_broadcast_buffers": None, "ddp_static_graph": None, "local_rank": -1,
    }),
)  # fmt: skip

_SPEED_GROUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    (_ITS_SPEED, {
        "use_transformers_continuous_batching": False, "transformers_continuous_batching_config": None,
        "use_transformers_paged": False, "cache_implementation": None,
    }),
    (_COMPILE, {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}),
    (_LIGER, {"use_liger_kernel": False, "liger_kernel_config": None}),
)  # fmt: skip
"""Options that change speed and memory only, and why they have nothing to do here."""

_SMALL_ADAMW = (
    "adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_apex_fused",
    "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit",
)  # fmt: skip
"""AdamW with its moments kept elsewhere or in fewer bits."""

FOREIGN: dict[str, Foreign] = {
    **{name: Foreign(off, advice) for advice, names in _FOREIGN_GROUPS for name, off in names.items()},
    **{name: Foreign(off, why, (), None) for why, names in _SPEED_GROUPS for name, off in names.items()},
    "vllm_group_port": Foreign(51216),  # weights are handed over by a file
    "trust_remote_code": Foreign(False, "set model_init_kwargs={'trust_remote_code': True}"),
    "cast_lm_head_to_fp32": Foreign(False, _FLOAT32_HEAD),
    "remove_unused_columns": Foreign(False, "reward functions are given every column they ask for; leave it out"),
    "pad_to_multiple_of": Foreign(None, _PACKED, ("auto",), None),
    "generation_kwargs": Foreign(None),
    "use_bias_correction_kl": Foreign(True, "the KL term always has the gradient of KL(policy || reference)"),
    "log_unique_prompts": Foreign(False, "set transcripts to say how many samples of a step are kept"),
    "optim": Foreign(
        "adamw_torch_fused",
        "torch's AdamW trains; pass optimizers=(optimizer, scheduler) to GRPOTrainer for another optimizer",
        ("adamw_torch", "adamw_hf", "adamw"),
        _SMALL_ADAMW,
    ),
    "optim_args": Foreign(None, "pass optimizers=(optimizer, scheduler) to GRPOTrainer", ("",)),
    "optim_target_modules": Foreign(None, "pass optimizers=(optimizer, scheduler) to GRPOTrainer"),
    "auto_find_batch_size": Foreign(False, "lower tokens_per_micro_batch, which bounds memory and changes no number"),
    "eval_delay": Foreign(0, "set eval_on_start=False and eval_steps"),
    "ignore_data_skip": Foreign(False, "a resumed run continues where it stopped; leave it out"),
    "full_determinism": Foreign(False, _DETERMINISM),
    "use_mps_device": Foreign(False, "the device is found; leave it out"),
    "logging_dir": Foreign(None, "everything that a run leaves is in output_dir", (), None),
    "overwrite_output_dir": Foreign(False, "give another output_dir, or delete the old one"),
    "resume_from_checkpoint": Foreign(None, "pass it to GRPOTrainer.train(resume_from_checkpoint=...)"),
    "debug": Foreign("", "use torch.autograd.set_detect_anomaly; leave it out", ([],)),
}  # fmt: skip


SWITCHED = {
    "use_vllm": [name for name in FOREIGN if name.startswith("vllm_")],
    "push_to_hub": [name for name in FOREIGN if name.startswith("hub_")],
}
"""What says nothing unless its switch is on."""

FOREIGN_ARGUMENTS: dict[str, Foreign] = {
    "quantization_config": Foreign(None, "weights are trained in float32 or bfloat16; leave it out"),
}
"""Arguments of TRL's GRPOTrainer that are none of ours."""


def check_arguments(values: Mapping[str, Any]) -> None:
    """Raises UsageError for what is no argument of GRPOTrainer, unless it is one of TRL's and does nothing."""
    refused = []
    for name, value in values.items():
        if name in FOREIGN_ARGUMENTS:
            option = FOREIGN_ARGUMENTS[name]
            nothing = value is None or (isinstance(value, list | tuple | dict) and not value)
            if option.advice and not nothing:
                refused.append(f"{name}: {option.advice}")
            continue
        close = difflib.get_close_matches(name, TRAINER_ARGUMENTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(TRAINER_ARGUMENTS)}"
        refused.append(f"GRPOTrainer has no argument {name!r}; {hint}")
    refuse(refused)


def translate(values: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings among `values`, under the names in `known`, and what has to be said of those that are refused.

    Foreign options at their off value are left out. Members of an enumeration are replaced by their values. Refused is
    a foreign option at any other value, an unknown name, with the closest known one, and a setting that is given under
    two names. A foreign option that would change only where or how fast is left out with a warning.
    """
    settings: dict[str, Any] = {}
    refused: list[str] = []
    if values.get("generation_kwargs") is not None:  # what stands there wins, as in TRL
        for_sampler, refused = _generation_settings(values["generation_kwargs"])
        values = {**values, **for_sampler}
    off = {switch for switch in SWITCHED if any(same(values.get(switch), nothing) for nothing in (None, False))}
    inert = {name for switch in off for name in SWITCHED[switch]}
    for given, value in values.items():
        if given in inert:
            continue
        if given in known:
            name = given
        elif given in RENAMED:
            name = RENAMED[given]
            # The old name's "nothing" must not overwrite what the new name says.
            if value is None or (name == "warmup_steps" and same(value, 0)):
                continue
        else:
            if problem := _foreign_problem(given, value, known):
                refused.append(problem)
            continue
        if name == "warmup_steps" and same(settings.get(name), 0):
            del settings[name]  # a script passes both on, and one of them says nothing
        elif name == "warmup_steps" and name in settings and same(value, 0):
            continue
        if name in settings and not same(settings[name], value):
            refused.append(
                f"{given}={shown(value)} and {name}={shown(settings[name])} are one setting; give {name} alone"
            )
        settings[name] = value.value if isinstance(value, Enum) else value
    return settings, refused


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal; what cannot say so, such as a tensor of several numbers, is not."""
    try:
        return bool(a == b)
    except Exception:  # comparing calls code of the value's class
        return a is b


def mapping_of(value: Any) -> Any:
    """A mapping that a command line gives as JSON; anything else as it is. Raises ValueError if the text is none."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("must be a mapping, or one as JSON text, such as '{\"name\": 1}'")
    return found


def _generation_settings(values: Any) -> tuple[dict[str, Any], list[str]]:
    """Settings of transformers' generate, under our names, and why the others among them are refused."""
    with contextlib.suppress(ValueError):
        values = mapping_of(values)
    if not isinstance(values, Mapping):
        return {}, [f"generation_kwargs={shown(values)} must be a mapping of {', '.join(sorted(GENERATION))}"]
    settings, refused = {}, []
    for given, value in values.items():
        name = _OF_GENERATION.get(str(given), given)
        if given == "do_sample" and value is True:
            continue
        if name in GENERATION:
            settings[name] = value
        else:
            refused.append(
                f"generation_kwargs={{{given!r}: {shown(value)}}}: the sampler does not know it; it knows "
                f"{', '.join(sorted(GENERATION))}{_ENDS.get(str(given), '')}"
            )
    return settings, refused


def _foreign_problem(name: str, value: Any, known: Collection[str]) -> str | None:
    """Why a name that is no setting is refused, or None. Warns of a value that is left out."""
    if name in FOREIGN:
        option = FOREIGN[name]
        value = value.value if isinstance(value, Enum) else value
        if not option.advice or value is None or any(same(value, off) for off in (option.off, *option.also_off)):
            return None
        if option.warned is None or any(same(value, one) for one in option.warned):
            _log.warning("%s=%s is left out: %s", name, shown(value), option.advice)
            return None
        return f"{name}={shown(value)}: {option.advice}"
    if name in TRAINER_ARGUMENTS:
        return f"{name!r} is an argument of GRPOTrainer, not a setting; pass it there"
    listed = "help(GRPOConfig) and `grouprl settings --lm` list the settings"
    return unknown_setting(name, [*known, *RENAMED, *FOREIGN], lambda: listed, ELSEWHERE)

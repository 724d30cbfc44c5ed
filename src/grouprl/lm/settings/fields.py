"""Every setting of the language-model arena, with its default and its bounds.

What it shares with environments stands in objective_settings.py.

Names, meanings and defaults are those of TRL's GRPOConfig and of transformers' TrainingArguments wherever the setting
exists there. Four defaults differ, none of which changes what is optimised:

- ``disable_dropout`` is on: the sampler runs without dropout, so that with it the ratio of the first update would not
  be 1 and the KL divergence to an equal reference not 0.
- ``gradient_checkpointing`` is off: micro-batches of ``tokens_per_micro_batch`` tokens already bound the memory that
  activations take, and recomputing them costs time.
- ``bf16`` is on only where the hardware is fast at it, and then beside float32 weights.
- ``report_to`` is TensorBoard, as everywhere in grouprl.

What TRL has and this has not is in `grouprl.lm.settings.trl`; what a batch is, in `grouprl.lm.settings.batch_plan`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from grouprl.errors import shown
from grouprl.lm.settings import fsdp
from grouprl.lm.settings.trl import mapping_of
from grouprl.objective.divergences import SAMPLED_DIVERGENCES
from grouprl.objective.estimators import names as estimator_names
from grouprl.objective.losses import names as loss_names
from grouprl.objective_settings import RENAMED_ADVANTAGES, RENAMED_LOSSES, ObjectiveSettings, OneOf

Strategy = Literal["no", "steps", "epoch"]


_LOSSES_ELSEWHERE = RENAMED_LOSSES | {"gspo": "grpo with importance_sampling_level='sequence'"}


class Fields(ObjectiveSettings):
    """The settings themselves; :class:`grouprl.lm.GRPOConfig` is what people use."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, validate_assignment=True, allow_inf_nan=False, protected_namespaces=()
    )

    # --- run -----------------------------------------------------------------------------------------------------
    output_dir: str | None = Field(None, description="folder of the run; default: a new one")
    run_name: str | None = Field(None, description="name shown by trackers; default: that of the folder")
    seed: int = Field(42, ge=0, description="of every random stream")
    data_seed: int | None = Field(None, ge=0, description="of the order of the prompts; default: seed")
    use_cpu: bool = Field(False, description="stay on the CPU even where there is an accelerator")
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        ("tensorboard",), description="trackers: tensorboard, wandb, several in a list, or none"
    )
    disable_tqdm: bool | None = Field(None, description="no progress bar; default: none where there is no terminal")

    # --- model ---------------------------------------------------------------------------------------------------
    model_init_kwargs: dict[str, Any] | None = Field(
        None, description="arguments of from_pretrained, for a model given by name"
    )
    disable_dropout: bool = Field(True, description="train without dropout, as the sampler samples")
    attention: Literal["auto", "plain"] = Field(
        "auto", description="auto = packed attention with shared prompts where the model allows it; plain = the model's"
    )
    native: bool = Field(
        True,
        description="run what compiled code can do by compiled code, C on a CPU and Triton on a GPU, compiled at first "
        "use; false = torch operations only",
    )
    bf16: bool | None = Field(
        None, description="matrix products in bfloat16; default: where the hardware is fast at it"
    )
    master_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the weights the optimizer steps"
    )
    freeze_embeddings: bool = Field(False, description="leave the token embeddings as they are")
    gradient_checkpointing: bool = Field(False, description="recompute activations instead of keeping them")
    gradient_checkpointing_kwargs: dict[str, Any] | None = Field(None, description="arguments of the recomputation")

    # --- prompts -------------------------------------------------------------------------------------------------
    shuffle_dataset: bool = Field(True, description="a new order of the prompts in every epoch; streams keep theirs")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="arguments of the chat template")

    # --- batch: see grouprl.lm.settings.batch_plan ----------------------------------------------------------------
    prompts_per_step: int | None = Field(
        None, ge=1, description="prompts per optimizer step, over all processes; replaces the next three settings"
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="completions per process and micro-step, as in TRL")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-steps per optimizer step, as in TRL")
    generation_batch_size: int | None = Field(
        None, ge=1, description="completions per generation over all processes, as in TRL"
    )
    steps_per_generation: int | None = Field(
        None, ge=1, description="micro-steps per generation, as in TRL; default: gradient_accumulation_steps"
    )
    num_generations: int = Field(8, ge=1, description="completions per prompt: the size of a group")
    num_iterations: int = Field(1, ge=1, description="passes over the completions of one generation")
    tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="tokens per forward and backward pass; bounds memory and changes no number; default: 2048, on a "
        "GPU as many as take an eighth of its memory",
    )
    dynamic_sampling: bool = Field(
        False, description="replace groups whose rewards are all equal by groups of further prompts (DAPO)"
    )
    dynamic_sampling_max_batches: int = Field(
        10,
        ge=1,
        description="most generations drawn for one batch by dynamic_sampling; then it goes on with what it has",
    )

    # --- sampling ------------------------------------------------------------------------------------------------
    max_prompt_length: int | None = Field(
        None, ge=1, description="most tokens of a prompt; a longer one is an error, for prompts are never cut"
    )
    max_completion_length: int = Field(
        512, ge=1, description="most tokens of a completion; of an episode, all that follows its prompt"
    )
    min_new_tokens: int = Field(0, ge=0, description="no end of sequence before; generation_kwargs may say it too")
    temperature: float = Field(1.0, gt=0, description="of sampling; the learner divides by it as well")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    top_k: int = Field(0, ge=0, description="sample from this many of the likeliest tokens; 0 = from all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="least probability, relative to that of the likeliest token"
    )
    repetition_penalty: float = Field(1.0, gt=0, description="above 1, tokens seen before become less likely")
    stop_strings: tuple[str, ...] | None = Field(
        None,
        description="texts that end a completion, or a turn of an episode; the token that completes one is the last",
    )
    max_rows_per_decode: int | None = Field(
        None, ge=1, description="completions sampled side by side; default: as many as memory suggests"
    )

    # --- episodes of several turns ---------------------------------------------------------------------------------
    max_turns: int | None = Field(
        None, ge=1, description="most turns of the model in an episode; default: any number, with history=turn 64"
    )
    max_turn_length: int | None = Field(
        None, ge=1, description="most tokens of one turn; max_completion_length bounds what follows the first prompt"
    )
    max_tool_calling_iterations: int | None = Field(
        None, ge=0, description="most turns of an episode whose tools are called, as in TRL; default: any number"
    )
    history: Literal["full", "turn"] = Field(
        "full",
        description="full = an episode is one sample, which grows; turn = each turn is a sample, which sees the first "
        "prompt and the last exchange",
    )
    tool_timeout: float | None = Field(
        60.0,
        gt=0,
        le=1e9,
        description="seconds that a call of a tool or an environment may take, which otherwise fails; None = any time",
    )
    max_tool_output: int = Field(
        4096, ge=64, description="most characters that a tool or an environment may say at once; the rest is cut off"
    )

    # --- rewards and advantages ----------------------------------------------------------------------------------
    reward_weights: tuple[float, ...] | None = Field(None, description="of the reward functions; default: 1 each")
    skip_special_tokens: bool = Field(
        False,
        description="leave all special tokens out of the completions that rewards read, as TRL does; false = only "
        "those that end or fill a completion",
    )
    reward_timeout: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="seconds that a call of a reward function may take, after which the run ends; default: any time",
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize",
        description="several reward functions: advantage of their sum, or sum of advantages (GDPO)",
    )
    advantage: Annotated[str, OneOf(estimator_names(environments=False), RENAMED_ADVANTAGES)] = Field(
        "outcome", description="estimator; the table of estimators says what each computes"
    )
    gamma: float = Field(
        1.0, ge=0, le=1, description="discount per turn; a completion is one turn, in which nothing is discounted"
    )
    pass_k: int | None = Field(None, ge=2, description="k of advantage=pass_at_k; default: num_generations")
    mask_truncated_completions: bool = Field(False, description="no loss from completions that were cut off")
    soft_overlong_cache: int | None = Field(
        None, ge=1, description="last tokens before max_completion_length over which the reward falls by up to 1 (DAPO)"
    )
    skip_zero_advantage: bool = Field(
        True, description="no forward pass for completions that cannot move the model; changes no gradient"
    )

    # --- loss ----------------------------------------------------------------------------------------------------
    loss_type: Annotated[str, OneOf(loss_names(environments=False), _LOSSES_ELSEWHERE)] = Field(
        "dapo",
        description="surrogate and how tokens are averaged, as in TRL; the table of losses says which is which",
    )
    importance_sampling_level: Literal["token", "turn", "sequence", "sequence_token"] = Field(
        "token",
        description="ratio per token, one per turn, one per completion (GSPO), or one with token gradients "
        "(GSPO-token)",
    )
    vespo_k_pos: float = Field(2.0, gt=0, description="of vespo's weight: how fast it falls below a ratio of 1, A >= 0")
    vespo_lambda_pos: float = Field(3.0, gt=0, description="how fast above, A >= 0")
    vespo_k_neg: float = Field(3.0, gt=0, description="how fast below, A < 0")
    vespo_lambda_neg: float = Field(2.0, gt=0, description="how fast above, A < 0")
    top_entropy_quantile: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learn from this share of the tokens of an optimizer step, those of the highest entropy; 1 = all",
    )
    entropy_coef: float = Field(
        0.0, ge=0, description="weight of the entropy bonus, a mean over the tokens that are learned from"
    )
    off_policy_mask_threshold: float | None = Field(
        None, gt=0, description="no loss from completions of negative advantage further than this from the sampler"
    )
    kl_estimator: Annotated[str, OneOf(SAMPLED_DIVERGENCES)] = Field(
        "k3", description="sampled estimate of that divergence"
    )
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="where it enters: a term of the loss, or of the reward"
    )
    sync_ref_model: bool = Field(False, description="move the reference towards the model as training goes on")
    ref_model_mixup_alpha: float = Field(0.6, gt=0, le=1, description="share of the model in the new reference")
    ref_model_sync_steps: int = Field(512, ge=1, description="optimizer steps between two such moves")

    # --- optimizer -----------------------------------------------------------------------------------------------
    learning_rate: float = Field(1e-6, gt=0, description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW; not applied to biases and norms")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="of AdamW")
    adam_epsilon: float = Field(1e-8, gt=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, ge=0, description="bound on the global gradient norm; 0 = none")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ] = Field("linear", description="schedule of the learning rate")  # fmt: skip
    lr_scheduler_kwargs: dict[str, Any] | None = Field(None, description="its further arguments")
    warmup_steps: float = Field(0, ge=0, description="optimizer steps of warmup; below 1: share of the run")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the dataset, if max_steps does not say")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: num_train_epochs says")

    # --- logging, evaluation, saving -----------------------------------------------------------------------------
    logging_strategy: Strategy = Field("steps", description="when metrics are logged")
    logging_steps: float = Field(10, gt=0, description="optimizer steps between; below 1: share of the run")
    logging_first_step: bool = Field(False, description="log the first step as well")
    log_completions: bool = Field(
        False, description="print completions when metrics are logged, and write them to transcripts.jsonl"
    )
    num_completions_to_print: int | None = Field(None, ge=1, description="how many; default: all of the last step")
    transcripts: int | Literal["all"] = Field(
        4,
        description="completions of each generation, or of each that is logged, written there, in whole groups, or all",
    )
    eval_strategy: Strategy = Field("no", description="when the model is evaluated")
    eval_steps: float | None = Field(
        None, gt=0, description="optimizer steps between; below 1: share of the run; default: logging_steps"
    )
    eval_on_start: bool = Field(False, description="evaluate before the first step")
    per_device_eval_batch_size: int | None = Field(
        None, ge=1, description="completions sampled and judged at once in evaluation, in whole groups; default: all"
    )
    num_generations_eval: int | None = Field(
        None, ge=1, description="completions per prompt in evaluation; default: num_generations"
    )
    save_strategy: Strategy = Field("steps", description="when checkpoints are written")
    save_steps: float = Field(500, gt=0, description="optimizer steps between; below 1: share of the run")
    save_total_limit: int | None = Field(None, ge=1, description="checkpoints kept; default: all")
    save_only_model: bool = Field(False, description="save the model alone; such a checkpoint cannot be resumed from")
    metric_for_best_model: str | None = Field(
        None,
        description="the number of an evaluation that says which model is best, such as reward, which is the default "
        "with load_best_model_at_end",
    )
    greater_is_better: bool | None = Field(
        None, description="whether more of it is better; default: unless its name ends in loss"
    )
    load_best_model_at_end: bool = Field(
        False, description="end with the model of the best checkpoint, which save_total_limit then spares"
    )
    ddp_timeout: float = Field(
        1800.0, gt=0, description="seconds that a process waits for another, where several train together"
    )
    ddp_backend: Literal["gloo", "nccl"] | None = Field(
        None,
        description="how they talk; default: nccl between GPUs, one for each process, and gloo between CPUs. gloo on "
        "GPUs lets several processes share one",
    )
    fsdp: bool | str = Field(
        False,
        description="shard the weights of a model that fits into no process (FSDP2), where several train together",
    )
    fsdp_config: dict[str, Any] | None = Field(None, description="how to shard, as in transformers")
    do_train: bool = Field(False, description="for scripts that ask for it; nothing here does")
    do_eval: bool = Field(False, description="the same; true where eval_strategy is given")
    do_predict: bool = Field(False, description="the same")

    @field_validator("output_dir", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        path = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(path, str) and not _is_utf8(path):
            raise ValueError(
                "the name is no text in UTF-8, which saving a tokenizer needs; name another folder, or set PYTHONUTF8=1"
            )
        return os.path.expanduser(path) if isinstance(path, str) else path

    @field_validator("fsdp", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> bool | str:
        return fsdp.switch(value)

    @field_validator("fsdp_config", mode="before")
    @classmethod
    def _fsdp_mapping(cls, value: Any) -> dict[str, Any] | None:
        return fsdp.mapping(value)

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        allowed = "choose tensorboard, wandb, both in a list, or none"
        if value is not None and value is not False and not isinstance(value, str | list | tuple | set | frozenset):
            raise ValueError(f"names no tracker; {allowed}")
        names = (value,) if isinstance(value, str) else tuple(value or ())
        if names == ("all",):
            names = tuple(name for name in ("tensorboard", "wandb") if find_spec(name) is not None)
        for name in names:
            if not isinstance(name, str) or name not in ("tensorboard", "wandb", "none"):
                raise ValueError(f"{shown(name)} is no tracker here; {allowed}")
        return tuple(name for name in names if name != "none")

    @field_validator(
        "model_init_kwargs", "gradient_checkpointing_kwargs", "chat_template_kwargs", "lr_scheduler_kwargs",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        return mapping_of(value)

    @field_validator("logging_strategy", "eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _no(cls, value: Any) -> Any:
        return "no" if value is False else value  # which is how YAML reads a bare no

    @field_validator("stop_strings", mode="before")
    @classmethod
    def _strings(cls, value: Any) -> Any:
        empty = isinstance(value, str | list | tuple) and not len(value)
        return None if empty else (value,) if isinstance(value, str) else value

    @field_validator("stop_strings")
    @classmethod
    def _no_empty_string(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value and not all(value):
            raise ValueError("must hold no empty text, which would end every completion")
        return value

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_tokens(cls, value: Any) -> Any:
        return 0 if value is None or (type(value) is int and value == -1) else value  # vLLM's word for all

    @field_validator("transcripts")
    @classmethod
    def _count(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("must be at least 0, or 'all'")
        return value

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be at least 1, or -1 for num_train_epochs to say")
        return value

    @field_validator("warmup_steps", "logging_steps", "eval_steps", "save_steps")
    @classmethod
    def _share_or_count(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and not value.is_integer():
            raise ValueError("must be a whole number of steps, or a share of the run below 1")
        return int(value) if value is not None and value.is_integer() else value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

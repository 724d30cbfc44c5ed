"""Every setting of the language-model arena, with its default and its bounds.

What it shares with environments stands in settings/objective.py.

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

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from grouprl.lm.settings import readers
from grouprl.lm.settings.fsdp import mapping as fsdp_mapping
from grouprl.lm.settings.fsdp import switch as fsdp_switch
from grouprl.lm.settings.trackers import TrackerName, read_trackers
from grouprl.lm.settings.trl import mapping_of
from grouprl.objective.correction import CorrectionMode
from grouprl.objective.divergences import SAMPLED_DIVERGENCES
from grouprl.objective.estimators import names as estimator_names
from grouprl.objective.losses import names as loss_names
from grouprl.settings.names import ADVANTAGES_ELSEWHERE, OneOf
from grouprl.settings.objective import ObjectiveSettings

Strategy = Literal["no", "steps", "epoch"]

_LOSSES_ELSEWHERE = {"gspo": "grpo with importance_sampling_level='sequence'"}


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
    report_to: tuple[TrackerName, ...] = Field(
        ("tensorboard",),
        description="trackers: tensorboard, wandb, trackio, mlflow, comet_ml or another of transformers', several in a "
        "list, all that are installed, or none",
    )
    project: str = Field("huggingface", description="of trackio")
    trackio_space_id: str | None = Field(None, description="Space on the hub where trackio shows the run")
    trackio_bucket_id: str | None = Field(None, description="bucket on the hub where trackio keeps it")
    trackio_static_space_id: str | bool | None = Field(
        None, description="Space where trackio leaves a snapshot after training; false = none"
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
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        description="weight of the loss that balances the load of a mixture of experts; default: that of the model's "
        "configuration",
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

    # --- vLLM in the place of the built-in sampler -----------------------------------------------------------------
    use_vllm: bool = Field(False, description="sample by vLLM, a package of its own, instead of the built-in sampler")
    vllm_mode: Literal["colocate", "server"] = Field(
        "colocate", description="colocate = vLLM runs in this process; server = a server that you have started samples"
    )
    vllm_server_base_url: str | None = Field(
        None, description="address of that server, such as http://localhost:8000; default: host and port say it"
    )
    vllm_server_host: str = Field("0.0.0.0", description="its host")
    vllm_server_port: int = Field(8000, ge=1, le=65535, description="its port")
    vllm_server_timeout: float = Field(240.0, gt=0, description="seconds to wait until the server is up")
    vllm_gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="share of the memory, on a CPU of the machine's, that vLLM takes in this process"
    )
    vllm_max_model_length: int | None = Field(
        None, ge=1, description="most tokens of a prompt and its completion in vLLM; default: the model's context"
    )
    vllm_tensor_parallel_size: int = Field(
        1, ge=1, description="devices that one model is split over; in this process 1, a server has its own option"
    )
    vllm_importance_sampling_correction: bool = Field(
        True, description="weigh what vLLM sampled by how likely it is under the model as it learns"
    )
    vllm_importance_sampling_mode: CorrectionMode = Field(
        "sequence_mask",
        description="ratio of each token or of the whole completion; beyond a bound it is truncated, or masked to 0",
    )
    vllm_importance_sampling_clip_max: float | None = Field(
        3.0, gt=0, description="upper bound of that ratio; null = none"
    )
    vllm_importance_sampling_clip_min: float | None = Field(
        None, ge=0, description="lower bound of that ratio; null = none"
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
    advantage: Annotated[str, OneOf(estimator_names(environments=False), ADVANTAGES_ELSEWHERE)] = Field(
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
    use_adaptive_entropy: bool = Field(
        False,
        description="entropy bonus only while the entropy is at most entropy_target, with a weight that begins at "
        "entropy_coef, rises then and falls otherwise (Skywork-OR1)",
    )
    entropy_target: float = Field(
        0.2, ge=0, description="that entropy in nats, a mean over the tokens that are learned from"
    )
    entropy_coef_delta: float = Field(0.005, ge=0, description="by how much the weight changes in an optimizer step")
    entropy_coef_min: float = Field(0.0, ge=0, description="its lower bound")
    entropy_coef_max: float = Field(1.0, ge=0, description="its upper bound")
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
    eval_pass_k: tuple[int, ...] | None = Field(
        None,
        description="k of eval_pass@k, the chance that one of k completions is right, without bias from all of an "
        "evaluation's; eval_avg@n, the share of right ones among n, comes with it",
    )
    solved_reward: float = Field(1.0, description="reward from which a completion counts as right in an evaluation")
    solved_by: str | None = Field(
        None, description="reward function whose reward that is; default: the weighted sum of all"
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

    # --- how values are read: see grouprl.lm.settings.readers -----------------------------------------------------
    _output_dir = field_validator("output_dir", mode="before")(readers.path)
    _report_to = field_validator("report_to", mode="before")(read_trackers)
    _fsdp = field_validator("fsdp", mode="before")(fsdp_switch)
    _fsdp_config = field_validator("fsdp_config", mode="before")(fsdp_mapping)
    _mappings = field_validator(
        "model_init_kwargs", "gradient_checkpointing_kwargs", "chat_template_kwargs", "lr_scheduler_kwargs",
        mode="before",
    )(mapping_of)  # fmt: skip
    _strategies = field_validator("logging_strategy", "eval_strategy", "save_strategy", mode="before")(readers.strategy)
    _stop_strings = field_validator("stop_strings", mode="before")(readers.texts)
    _some_text = field_validator("stop_strings")(readers.no_empty_text)
    _eval_pass_k = field_validator("eval_pass_k", mode="before")(readers.numbers)
    _at_least_one = field_validator("eval_pass_k")(readers.at_least_one)
    _top_k = field_validator("top_k", mode="before")(readers.top_k)
    _transcripts = field_validator("transcripts")(readers.number_of_transcripts)
    _max_steps = field_validator("max_steps")(readers.max_steps)
    _shares = field_validator("warmup_steps", "logging_steps", "eval_steps", "save_steps")(readers.share_or_count)

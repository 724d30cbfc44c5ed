"""Names of settings in TRL's ModelConfig, Unsloth, verl and OpenRLHF that are none here, with what to do instead."""

from __future__ import annotations

_ADVICE = (
    (
        "use_peft use_lora lora_r lora_rank lora_alpha lora_dropout lora_target_modules",
        "pass GRPOTrainer(peft_config=LoraConfig(...)); in a recipe it is the setting lora",
    ),
    (
        "load_in_4bit load_in_8bit use_bnb_nested_quant bnb_4bit_quant_type quantization_config",
        "weights are trained in float32 or bfloat16; leave it out",
    ),
    (
        "dtype torch_dtype attn_implementation device_map revision model_revision",
        "it says how a model is loaded; put it into model_init_kwargs, or pass a loaded model to GRPOTrainer",
    ),
    (
        "chat_template_path chat_template",
        "set tokenizer.chat_template to the text of the template, and pass GRPOTrainer(processing_class=tokenizer)",
    ),
    (
        "model_name model_name_or_path model_id",
        "pass GRPOTrainer(model=...); in a recipe it is the setting model",
    ),
    (
        "dataset_name dataset",
        "pass GRPOTrainer(train_dataset=...); in a recipe it is the setting task",
    ),
    (
        "reward_model reward_model_path reward_fn reward_func",
        "pass GRPOTrainer(reward_funcs=...); in a recipe it is the setting reward",
    ),
    (
        "max_seq_length max_length max_model_len max_new_tokens max_response_length response_length",
        "max_completion_length bounds what is sampled; a prompt is never cut",
    ),
    (
        "rollout_n n_samples_per_prompt group_size num_rollouts num_return_sequences",
        "num_generations is the number of completions of a prompt",
    ),
    (
        "batch_size train_batch_size rollout_batch_size",
        "prompts_per_step says how many prompts a step has; per_device_train_batch_size counts completions",
    ),
    (
        "micro_batch_size ppo_micro_batch_size micro_train_batch_size",
        "tokens_per_micro_batch bounds how much is computed at once; leave it out",
    ),
    (
        "ppo_mini_batch_size",
        "steps_per_generation says how many steps are taken on what was sampled once",
    ),
    (
        "clip_range clip_ratio clip_coef clip_ratio_low",
        "it is epsilon here (the bound below, and above unless epsilon_high says another)",
    ),
    (
        "clip_ratio_high clip_higher",
        "it is epsilon_high here",
    ),
    (
        "adv_estimator advantage_estimator",
        "it is advantage here: 'outcome' is GRPO, 'leave_one_out' is RLOO",
    ),
    (
        "unsloth fast_inference packing use_flash_attn flash_attn",
        "the sampler and the training step are fast by themselves; leave it out",
    ),
    (
        "epochs num_epochs total_epochs",
        "it is num_train_epochs here",
    ),
    (
        "kl_loss_coef init_kl_coef use_kl_loss",
        "beta is the weight of the divergence; 0 is none",
    ),
    (
        "verbose log_interval",
        "logging_steps says after how many steps numbers are printed",
    ),
    (
        "test_freq eval_freq",
        "eval_strategy='steps' with eval_steps says when to evaluate",
    ),
    (
        "save_freq checkpoint_every",
        "save_steps says how often a checkpoint is written",
    ),
)

ELSEWHERE = {name: advice for names, advice in _ADVICE for name in names.split()}
"""For each name, one sentence with what to do instead."""

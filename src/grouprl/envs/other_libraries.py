"""Names of settings in CleanRL, RLlib, Tianshou and Brax that are none here, with what to do instead."""

from __future__ import annotations

_ADVICE = (
    (
        "clip_coef clip_param clip_ratio",
        "it is epsilon here (the bound below, and above unless epsilon_high says another)",
    ),
    (
        "total_timesteps total_steps num_timesteps max_epochs",
        "learn(total_timesteps) says how long, or --steps on the command line",
    ),
    (
        "anneal_lr lr_decay lr_scheduler learning_rate_schedule",
        "lr_schedule='linear' lowers learning_rate to lr_final; 'constant' keeps it",
    ),
    (
        "num_minibatches",
        "minibatch_size says how many steps each holds",
    ),
    (
        "train_batch_size",
        "n_envs times n_steps with collect='segments', or min_steps with whole episodes, make a batch",
    ),
    (
        "rollout_fragment_length",
        "it is n_steps here, with collect='segments'",
    ),
    (
        "norm_adv advantage_normalization standardize_advantages",
        "advantages are standardised as the estimator demands (setting advantage); leave it out",
    ),
    (
        "norm_reward normalize_reward reward_scale reward_scaling reward_normalization",
        "rewards need no scaling, because advantages are scaled; leave it out",
    ),
    (
        "clip_vloss vf_clip_param vf_loss_coeff value_coef",
        "there is no value network, and so no loss of it; leave it out",
    ),
    (
        "optimizer optimizer_class optimizer_kwargs weight_decay",
        "Adam trains, without weight decay; its settings are learning_rate, adam_epsilon and max_grad_norm",
    ),
    (
        "buffer_size tau learning_starts train_freq gradient_steps target_update_interval",
        "training is on-policy, so there is no replay buffer and no target network; leave it out",
    ),
    (
        "wrapper_class env_wrapper wrappers frame_stack",
        "give a function that returns the wrapped environment: GRPO(lambda: Wrapper(gym.make(...)))",
    ),
    (
        "vec_env_cls vec_env_kwargs num_workers num_env_runners n_jobs",
        "n_envs says how many are stepped side by side, and vectorization how",
    ),
    (
        "eval_freq n_eval_episodes eval_interval",
        "callback=Evaluations(every) evaluates (grouprl.envs.callbacks)",
    ),
    (
        "policy_class",
        "network= takes a function (inputs, outputs) -> torch.nn.Module",
    ),
    (
        "_init_setup_model",
        "the network is always made at once; leave it out",
    ),
)

ELSEWHERE = {name: advice for names, advice in _ADVICE for name in names.split()}
"""For each name, one sentence with what to do instead."""

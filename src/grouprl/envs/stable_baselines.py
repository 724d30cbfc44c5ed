"""What a hand used to Stable-Baselines3 types, and what it is called here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from grouprl.envs import other_libraries
from grouprl.errors import UsageError, with_type
from grouprl.settings.names import ALIASES

NO_POLICY_NAME = (
    "there are no names of policies: the network follows the observation space; GRPO(env, hidden_sizes=(64, 64), "
    "activation='tanh'), or network=your own function (inputs, outputs) -> torch.nn.Module"
)

SAME_THING = ("n_epochs", "ent_coef", "batch_size", "net_arch", "activation_fn")
"""Arguments of Stable-Baselines3 that are settings of another name here."""

ELSEWHERE = {
    "policy": NO_POLICY_NAME,
    "policy_kwargs": "its entries are settings here: net_arch is hidden_sizes=(64, 64), activation_fn is "
    "activation='tanh', log_std_init is log_std_init; a network of your own is network=...",
    "verbose": "learn(progress_bar=True) shows how far it is; a callback gets the metrics of every update",
    "tensorboard_log": "learn(n, callback=Run(folder)) writes TensorBoard's files (grouprl.envs.callbacks)",
    "stats_window_size": "it is always 100 here (agent.recent_returns)",
    "vf_coef": "there is no value network, and so no loss of it; leave it out",
    "clip_range": "it is epsilon here (the bound below, and above unless epsilon_high says another)",
    "clip_range_vf": "there is no value network to clip; leave it out",
    "normalize_advantage": "advantages are standardised as the estimator demands (setting advantage); leave it out",
    "target_kl": "it is kl_stop here; kl_target is another thing, which an adaptive learning rate aims at",
    "use_sde": "there is no state-dependent exploration; sticky=0.9 repeats actions instead",
    "sde_sample_freq": "there is no state-dependent exploration; sticky=0.9 repeats actions instead",
    "rollout_buffer_class": "there is no buffer class; collect, n_steps and min_steps say what a batch holds",
    "rollout_buffer_kwargs": "there is no buffer class; collect, n_steps and min_steps say what a batch holds",
    "eval_env": "callback=Evaluations(every, env=env) evaluates there (grouprl.envs.callbacks)",
    "custom_objects": "nothing is pickled here; leave it out",
    "print_system_info": "leave it out",
    "force_reset": "every learn on an environment of yours begins with fresh episodes; leave it out",
    "log_interval": "a callback gets the metrics of every update; leave it out",
    "tb_log_name": "the folder names a run: learn(n, callback=Run(folder)); leave it out",
    "reset_num_timesteps": "num_timesteps always counts on, and schedules run over one call of learn; leave it out",
}
"""Arguments of Stable-Baselines3 that are no settings here: for each, one sentence with what to do instead."""

EVERYWHERE = {**other_libraries.ELSEWHERE, **ELSEWHERE}
"""The same, with the names of other libraries."""


ATTRIBUTES = {
    "logger": "a callback gets the metrics of every update, and callback=Run(folder) writes "
    "metrics.csv and TensorBoard's files (grouprl.envs.callbacks)",
    "set_logger": "a callback gets the metrics of every update, and can log them where you like",
    "ep_info_buffer": "agent.recent_returns has the returns of the last 100 training episodes",
    "ep_success_buffer": "info is not read here; play episodes with agent.predict and count successes there",
    "set_parameters": "agent.policy.load_state_dict(tensors) is it; GRPO.load(path) reads a saved agent",
    "get_vec_normalize_env": "observations are normalised inside the policy, and saved with it",
    "rollout_buffer": "a batch is gone when it was learned from; a callback gets its metrics",
    "collect_rollouts": "agent.learn(total_timesteps) collects and learns, one batch after the other",
    "train": "agent.learn(total_timesteps) trains",
    "set_random_seed": "the seed is given at construction: GRPO(env, seed=0)",
    "lr_schedule": "agent.config.lr_schedule names it; metrics hold the learning_rate of every update",
    "verbose": "learn(progress_bar=True) shows how far it is",
    "action_noise": "the policy itself draws; entropy_coef, log_std_init and sticky say how much it explores",
}
"""Attributes and methods of Stable-Baselines3's models that a GRPO has not: for each, what to use instead."""


def missing_attribute(name: str, settings: Collection[str]) -> str:
    """What to say where an agent has no attribute ``name``. ``settings`` are the names of its configuration."""
    said = f"GRPO has no attribute {name!r}"
    setting = ALIASES.get(name, name)
    if name in ATTRIBUTES:
        return f"{said}: {ATTRIBUTES[name]}"
    if setting in settings:
        return f"{said}: it is agent.config.{setting}"
    if name in EVERYWHERE:
        return f"{said}: {EVERYWHERE[name]}"
    return said


SIGNATURE = "a callback is a function callback(agent, metrics) that returns False to stop, else True or None"


def refuse_arguments(function: str, names: Sequence[str]) -> None:
    """Raise UsageError for arguments that ``function`` does not have, with what to do instead."""
    for name in names:
        hint = EVERYWHERE.get(name) or f"it takes {', '.join(_ARGUMENTS[function])}"
        raise UsageError(f"{function} has no argument {name!r}: {hint}")


_ARGUMENTS = {"learn": ("total_timesteps", "callback", "progress_bar")}


def refuse_positional(first: Any, others: Sequence[Any]) -> None:
    """Raise UsageError for ``GRPO("MlpPolicy", env)`` and other arguments by position."""
    if not others:
        return
    if isinstance(first, str) and (first.endswith("Policy") or not isinstance(others[0], str)):
        raise UsageError(f"GRPO({first!r}, env): {NO_POLICY_NAME}")
    raise UsageError(f"GRPO(env, {with_type(others[0])}): only the environment is given by position; name the others")


def checked_callbacks(callback: Any) -> list[Callable[..., Any]]:
    """``callback``, None or one or several functions, as a list.

    Raises:
        UsageError: one is a callback object of Stable-Baselines3, or cannot be called with (agent, metrics).
    """
    given = [] if callback is None else list(callback) if isinstance(callback, list | tuple) else [callback]
    for one in given:
        names = dir(one)
        if "init_callback" in names or "on_training_start" in names:
            raise UsageError(
                f"{with_type(one)} is a callback of another library; {SIGNATURE}; grouprl.envs.callbacks "
                "has Checkpoints, Evaluations, StopAtReturn, Videos, and Run for a whole run folder"
            )
        if not callable(one):
            raise UsageError(f"callback={with_type(one)}; {SIGNATURE}")
        if inspect.iscoroutinefunction(one) or inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one):
            raise UsageError(f"the callback {with_type(one)} would not run when called (async, or yield); {SIGNATURE}")
        try:
            parameters = inspect.signature(one)
        except (TypeError, ValueError):  # some built-in functions have none
            continue
        try:
            parameters.bind(None, None)
        except TypeError:
            raise UsageError(f"the callback {with_type(one)} takes {parameters}; {SIGNATURE}") from None
        if list(parameters.parameters)[:2] in (["_locals", "_globals"], ["locals_", "globals_"], ["lcl", "glb"]):
            raise UsageError(f"the callback takes {parameters}, as Stable-Baselines3 calls it; {SIGNATURE}")
    return given


def says_stop(verdict: Any) -> bool:
    """Whether what a callback returned is False, or a number or an array that is false; None goes on."""
    if verdict is None or isinstance(verdict, bool):
        return verdict is False
    values = np.asarray(verdict.detach().cpu() if hasattr(verdict, "detach") else verdict)
    return values.dtype.kind in "biuf" and values.size == 1 and not values.any()

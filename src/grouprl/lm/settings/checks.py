"""Settings that are each allowed but do not go together."""

from __future__ import annotations

from grouprl.lm.settings.fields import Fields
from grouprl.lm.settings.fsdp import read_sharding
from grouprl.lm.settings.launcher import launcher_problems
from grouprl.objective import ESTIMATORS, LOSSES
from grouprl.settings.objective import objective_problems


def problems(config: Fields) -> list[str]:
    """What is wrong with the combination of settings and how to fix it, one sentence each; empty if nothing is."""
    return [
        *_batch_problems(config),
        *_advantage_problems(config),
        *_objective_problems(config),
        *_best_problems(config),
        *_vllm_problems(config),
        *_sharding_problems(config),
        *launcher_problems(config),
    ]


def _batch_problems(c: Fields) -> list[str]:
    found: list[str] = []
    if c.prompts_per_step is not None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size"):
            default = type(c).model_fields[name].default
            if getattr(c, name) != default:
                found.append(
                    f"prompts_per_step={c.prompts_per_step} and {name}={getattr(c, name)} both say how large a step "
                    f"is; leave {name} at {default}, or leave prompts_per_step out"
                )
    both = c.generation_batch_size, c.steps_per_generation
    if None not in both and both[0] != c.per_device_train_batch_size * (both[1] or 1):
        found.append(
            f"generation_batch_size={c.generation_batch_size} and steps_per_generation={c.steps_per_generation} both "
            "say how large a generation is; give one of them"
        )
    if c.soft_overlong_cache is not None and c.soft_overlong_cache >= c.max_completion_length:
        found.append(
            f"soft_overlong_cache={c.soft_overlong_cache} must be below max_completion_length="
            f"{c.max_completion_length}; a quarter of it is usual"
        )
    return found


def _advantage_problems(c: Fields) -> list[str]:
    found: list[str] = []
    if c.multi_objective_aggregation == "normalize_then_sum":
        for name, on in (
            ("kl_in='reward'", c.beta > 0 and c.kl_in == "reward"),
            ("soft_overlong_cache", c.soft_overlong_cache),
        ):
            if on:
                found.append(
                    f"multi_objective_aggregation='normalize_then_sum' normalises each reward function alone, which "
                    f"leaves no place for {name}; use 'sum_then_normalize', or make it a reward function"
                )
    if c.num_generations == 1 and ESTIMATORS[c.advantage].compares:
        found.append(
            f"num_generations=1 leaves advantage={c.advantage!r} nothing to compare with; set num_generations=2 or "
            "more, or advantage='reinforce_pp'"
        )
    if c.num_generations == 1 and c.dynamic_sampling:
        found.append("dynamic_sampling compares the rewards of a group; set num_generations=2 or more, or leave it out")
    if not ESTIMATORS[c.advantage].compares and c.dynamic_sampling:
        found.append(
            f"dynamic_sampling replaces groups that teach nothing, and advantage={c.advantage!r} learns from all; "
            "leave dynamic_sampling out, or set advantage='reinforce_pp_baseline'"
        )
    if ESTIMATORS[c.advantage].nonnegative:
        penalties = (
            ("soft_overlong_cache", c.soft_overlong_cache is not None),
            ("kl_in='reward'", c.beta > 0 and c.kl_in == "reward"),
            (f"reward_weights={c.reward_weights}", any(w < 0 for w in c.reward_weights or ())),
        )
        for name, on in penalties:
            if on:
                found.append(
                    f"advantage={c.advantage!r} divides by the mean reward, which must not be negative, and {name} can "
                    "make it so; leave it out, or choose another advantage"
                )
    if c.pass_k is not None and c.advantage != "pass_at_k":
        found.append(f"pass_k={c.pass_k} is for advantage='pass_at_k', and advantage is {c.advantage!r}; leave it out")
    if c.pass_k is not None and c.pass_k > c.num_generations:
        found.append(f"pass_k={c.pass_k} must not exceed num_generations={c.num_generations}; lower it")
    if c.multi_objective_aggregation == "normalize_then_sum" and c.scale_rewards != "group":
        found.append(
            f"scale_rewards={c.scale_rewards!r} has no effect with multi_objective_aggregation='normalize_then_sum', "
            "which scales within groups and then over the batch; leave one of them out"
        )
    if c.advantage != "outcome":
        if c.scale_rewards == "batch" and c.advantage != "gigpo":
            found.append(
                f"scale_rewards='batch' is for advantage='outcome', and advantage is {c.advantage!r}; leave one of "
                "them out"
            )
        if c.multi_objective_aggregation == "normalize_then_sum":
            found.append(
                "multi_objective_aggregation='normalize_then_sum' is an estimator of its own and needs "
                f"advantage='outcome', and advantage is {c.advantage!r}; leave one of them out"
            )
    return found


def _objective_problems(c: Fields) -> list[str]:
    found = objective_problems(c, c.loss_type, c.advantage)
    levels = LOSSES[c.loss_type].levels
    if c.importance_sampling_level not in levels:
        found.append(
            f"importance_sampling_level={c.importance_sampling_level!r} does not go with loss_type={c.loss_type!r}; "
            f"set importance_sampling_level={levels[0]!r}"
        )
    if c.entropy_coef_min > c.entropy_coef_max:
        found.append(
            f"entropy_coef_min={c.entropy_coef_min} is above entropy_coef_max={c.entropy_coef_max}; lower one or raise "
            "the other"
        )
    if c.sync_ref_model and c.beta == 0:
        found.append("sync_ref_model=True needs a reference model, which beta=0 has not; set beta, or leave it out")
    return found


def _best_problems(c: Fields) -> list[str]:
    found: list[str] = []
    n = c.num_generations_eval or c.num_generations
    if c.eval_pass_k is not None and max(c.eval_pass_k) > n:
        found.append(
            f"eval_pass_k={list(c.eval_pass_k)}: an evaluation samples {n} completions of a prompt, and k must not "
            "exceed that; raise num_generations_eval, or lower k"
        )
    metric = c.metric_for_best_model or ("reward" if c.load_best_model_at_end else None)
    if metric is not None and c.eval_strategy == "no":
        found.append(
            f"metric_for_best_model={metric!r} is a number of evaluations, and there are none; set "
            "eval_strategy='steps' or 'epoch', or leave it out"
        )
    elif c.load_best_model_at_end:
        every, saves = c.eval_steps or c.logging_steps, c.save_steps
        if c.save_strategy != c.eval_strategy or (c.eval_strategy == "steps" and _remainder(saves, every)):
            found.append(
                "load_best_model_at_end=True needs an evaluation of every model that is saved; set save_strategy="
                f"{c.eval_strategy!r}"
                + (f" and save_steps={every:g}, or a multiple of it" if c.eval_strategy == "steps" else "")
            )
    if metric in ("loss", "eval_loss"):
        found.append(f"metric_for_best_model={metric!r}: evaluations have no loss, they judge; 'reward' is usual")
    return found


def _vllm_problems(c: Fields) -> list[str]:
    if not c.use_vllm:
        return []
    found: list[str] = []
    if c.vllm_tensor_parallel_size > 1:
        found.append(
            f"vllm_tensor_parallel_size={c.vllm_tensor_parallel_size}: vLLM in this process runs on one device; leave "
            "it out, or start a server with --tensor-parallel-size and set vllm_mode='server'"
        )
    if c.vllm_importance_sampling_correction:
        low, high = c.vllm_importance_sampling_clip_min, c.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low > high:
            found.append(
                f"vllm_importance_sampling_clip_min={low} is above vllm_importance_sampling_clip_max={high}; swap them"
            )
        if c.loss_type == "vespo":
            found.append(
                "loss_type='vespo' weighs completions by their ratio itself; set "
                "vllm_importance_sampling_correction=False"
            )
    return found


def _sharding_problems(c: Fields) -> list[str]:
    try:
        if c.fsdp:
            read_sharding(c.fsdp, c.fsdp_config)
    except ValueError as error:
        return [str(error)]
    return []


def _remainder(steps: float, of: float) -> bool:
    """Whether ``steps`` is no multiple of ``of``; both may be shares of a run."""
    if (steps < 1) != (of < 1):
        return True
    times = steps / of
    return abs(times - round(times)) > 1e-9 or times < 1

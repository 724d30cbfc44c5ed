"""What a trainer plays with, from the arguments of a GRPOTrainer: interactions, the rewards they give, the player."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grouprl.errors import UsageError, shown
from grouprl.lm.agents.chat_format import ChatFormat
from grouprl.lm.agents.interactions import Interactions
from grouprl.lm.agents.tool_use import Limits
from grouprl.lm.generate.collect import Player
from grouprl.lm.generate.completions import CompletionPlayer
from grouprl.lm.generate.play import EpisodePlayer
from grouprl.lm.generate.rollout_function import RolloutPlayer
from grouprl.lm.models.context import context_length
from grouprl.lm.models.load import eos_token_ids
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import PromptSource, prepare_starts, room_for_prompts
from grouprl.lm.rewards.call import RewardCaller
from grouprl.lm.rewards.model import RewardModel, with_models
from grouprl.lm.settings.batch_plan import BatchPlan
from grouprl.lm.settings.config import GRPOConfig


@dataclass(frozen=True)
class Acting:
    """What makes episodes of several turns: the arguments of a GRPOTrainer of the same names."""

    tools: Any = None
    environment_factory: Any = None
    rollout_func: Any = None


def make_interactions(config: GRPOConfig, acting: Acting) -> Interactions | None:
    """Tools and environments, or None. Raises UsageError if they cannot be used."""
    if acting.rollout_func is not None:
        if not callable(acting.rollout_func):
            raise UsageError(f"rollout_func is {shown(acting.rollout_func)}; give a function (prompts, trainer)")
        if acting.tools or acting.environment_factory is not None:
            raise UsageError(
                "rollout_func samples in the place of the trainer, so nothing would call the tools or the environments "
                "that are given beside it; leave them out, or leave rollout_func out"
            )
        return None
    if not acting.tools and acting.environment_factory is None:
        return None
    limits = Limits(config.tool_timeout, config.max_tool_output, config.max_tool_calling_iterations)
    return Interactions(acting.environment_factory, acting.tools, limits, config.tool_timeout)


def about_acting(acting: Acting, interactions: Interactions | None) -> dict[str, Any]:
    """What the model acts with, as plain values, by which a checkpoint is told from one of another run."""
    function = acting.rollout_func
    own = None if function is None else str(getattr(function, "__name__", type(function).__name__))
    return {"rollout_func": own, **({} if interactions is None else interactions.described)}


@dataclass(frozen=True)
class Judges:
    """What judges: the arguments of a GRPOTrainer of the same names."""

    reward_funcs: Any = None
    reward_processing_classes: Any = None
    eval_reward_funcs: Any = None


def make_rewards(
    judges: Judges, config: GRPOConfig, interactions: Interactions | None
) -> tuple[RewardCaller, RewardCaller]:
    """What judges in training and what judges in evaluation, which is the same unless something else is given.

    Raises UsageError if nothing does, or a reward model cannot be used.
    """
    given = judges.reward_funcs
    functions = None if given is None else _functions(given, judges.reward_processing_classes, config)
    training = _caller(functions, config, interactions, config.reward_weights)
    if judges.eval_reward_funcs is None:
        return training, training
    return training, _caller(_functions(judges.eval_reward_funcs, None, config), config, interactions, None)


def check_readable(prompts: PromptSource | None, *callers: RewardCaller) -> None:
    """Raises UsageError if a reward model cannot read the first of the prompts."""
    if prompts is None or not any(isinstance(f, RewardModel) for caller in callers for f in caller.functions):
        return
    first = prompts[0].prompt
    for caller in callers:
        for function in caller.functions:
            if isinstance(function, RewardModel):
                function.check(first)


def _functions(given: Any, tokenizers: Any, config: GRPOConfig) -> list[Any]:
    return with_models(
        given, tokenizers, device=config.device, model_init_kwargs=config.model_init_kwargs,
        chat_template_kwargs=config.chat_template_kwargs,
    )  # fmt: skip


def _caller(
    functions: list[Any] | None, config: GRPOConfig, interactions: Interactions | None, weights: Any
) -> RewardCaller:
    """The reward functions, those of environments behind the user's, with weight 1."""
    if interactions is None:
        if functions is None:
            raise UsageError(
                "reward_funcs is missing; give a function of the completions, or environment_factory with an "
                "environment that has get_reward"
            )
        return RewardCaller(functions, weights, config.reward_timeout)
    own = functions or []
    if not own and not interactions.rewards and not interactions.gives_rewards:
        raise UsageError(
            "nothing gives rewards; give reward_funcs, or an environment with get_reward, which returns a number"
        )
    if weights is not None and len(weights) == len(own):
        weights = (*weights, *[1.0] * len(interactions.rewards))
    return RewardCaller(
        [*own, *interactions.rewards], weights, config.reward_timeout, alone=not interactions.gives_rewards,
        loop=interactions.loop,
    )  # fmt: skip


def starts_without_rows(config: GRPOConfig, plan: BatchPlan, interactions: Interactions) -> list[dict[str, Any]]:
    """Rows without columns, for environments that draw their starts themselves."""
    if interactions.several:
        raise UsageError(
            "environment_factory holds several environments, and there is no train_dataset with a column 'environment' "
            "that says which is played; give one"
        )
    if config.max_steps < 1:
        raise UsageError(
            "without a train_dataset nothing says how long training lasts; set max_steps, such as "
            "GRPOConfig(max_steps=100)"
        )
    return [{} for _ in range(plan.prompts_per_generation)]


def read_starts(interactions: Interactions, dataset: Any, name: str, *, needs_prompt: bool) -> PromptSource:
    """The rows of a dataset as starts of episodes. Raises UsageError if it cannot be used, or one of the first rows."""
    starts = prepare_starts(dataset, name, needs_prompt=needs_prompt)
    interactions.check_rows(starts)
    return starts


def make_player(
    policy: Policy, tokenizer: Any, rewards: RewardCaller, config: GRPOConfig, interactions: Interactions | None,
    acting: Acting, prompts: PromptSource | None,
) -> Player:  # fmt: skip
    """The player that the arguments ask for. Raises UsageError if the chat template cannot serve it."""
    if acting.rollout_func is not None:
        return RolloutPlayer(policy, tokenizer, rewards, config, acting.rollout_func)
    if interactions is None:
        return CompletionPlayer(policy, tokenizer, rewards, config)
    room, bound = room_for_prompts(context_length(policy.model), config.max_completion_length, config.max_prompt_length)
    ends = eos_token_ids(policy.model, tokenizer)
    skip = config.skip_special_tokens
    form = ChatFormat(tokenizer, config.chat_template_kwargs, ends, room, bound, skip_special_tokens=skip)
    player = EpisodePlayer(policy, form, interactions, rewards, config)
    if interactions.has_tools and prompts is not None and not isinstance(prompts[0].prompt, str):
        player.check_format()
    return player

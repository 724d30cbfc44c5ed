"""From rewards to advantages: which estimator of :mod:`grouprl.objective` the settings name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grouprl import objective
from grouprl.errors import TrainingError
from grouprl.lm.rewards.call import total
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective.estimators import ESTIMATORS, Estimation
from grouprl.objective.groups import LARGEST_RETURN
from grouprl.objective.packed import last_index, segment_sum
from grouprl.objective.user_functions import TensorFunction, own_advantages


def estimate_advantages(
    config: GRPOConfig, rewards: Tensor, weights: Tensor, returns: Tensor, lengths: Tensor, group: Tensor,
    penalties: Tensor | None = None, own: TensorFunction | None = None,
) -> Tensor:  # fmt: skip
    """Advantages ``[S]`` of the tokens of completions as the settings say, in float32.

    A completion is one turn in one state, which its group shares: that of the prompt.

    Args:
        rewards: ``[N, F]``, NaN where a function does not apply. weights: ``[F]``.
        returns: ``[N]`` their weighted sum. lengths, group: ``[N]``.
        penalties: ``[S]`` what is taken from the reward at each token (KL in the reward), or None.
        own: a user's estimator, in the place of the settings'.

    Raises TrainingError if rewards, penalties or advantages are too large to compute with.
    """
    largest = _largest(returns)
    if penalties is not None and not bool(penalties.isfinite().all()):
        raise TrainingError(
            "the divergence to the reference is not finite: the policy has moved too far from it; lower learning_rate, "
            "raise beta, or set kl_estimator='k1'"
        )
    if own is None and config.multi_objective_aggregation == "normalize_then_sum":
        return _finite(objective.gdpo(rewards, weights, lengths, group), largest)
    steps = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    steps[last_index(lengths)] = returns.double()
    if penalties is not None:
        steps -= penalties
    if own is not None or not ESTIMATORS[config.advantage].turns:
        return _finite(_by_settings(config, steps, lengths, group, 1.0, None, own), largest)
    one = torch.ones_like(lengths)
    of_turns = _by_settings(config, segment_sum(steps, lengths), one, group, config.gamma, lambda: group, None)
    return _finite(of_turns.repeat_interleave(lengths), largest)


def estimate_turns(
    config: GRPOConfig, rewards: Tensor, per_function: Tensor, weights: Tensor, lengths: Tensor, group: Tensor,
    states: Callable[[], Tensor], own: TensorFunction | None = None,
) -> Tensor:  # fmt: skip
    """Advantages ``[T]`` of the T turns of E episodes as the settings say, in float32: here a step is a turn.

    Args:
        rewards: ``[T]``. lengths: ``[E]`` turns of each episode. group: ``[E]``.
        per_function: ``[E, F]`` what each reward function gave an episode, NaN where it does not apply; used if each is
            normalised on its own. weights: ``[F]``.
        states: gives ``[T]`` int64, equal where turns were taken in equal states; called if an estimator needs it.
        own: a user's estimator, in the place of the settings'; it gets ``rewards``, ``lengths`` and ``group``, and
            what it asks for by the names ``states`` and ``gamma``.

    Raises TrainingError if rewards or advantages are too large to compute with.
    """
    largest = _largest(segment_sum(rewards.abs(), lengths))
    if own is None and config.multi_objective_aggregation == "normalize_then_sum":
        return _finite(objective.gdpo(per_function, weights, lengths, group), largest)
    return _finite(_by_settings(config, rewards, lengths, group, config.gamma, states, own), largest)


def _by_settings(
    config: GRPOConfig, rewards: Tensor, lengths: Tensor, group: Tensor, gamma: float,
    states: Callable[[], Tensor] | None, own: TensorFunction | None,
) -> Tensor:  # fmt: skip
    if own is not None:
        offered: dict[str, Callable[[], Any]] = {"gamma": lambda: gamma}
        if states is not None:
            offered["states"] = states
        return own_advantages(own, rewards, lengths, group, offered)
    estimator = ESTIMATORS[config.advantage]
    assert estimator.function is not None
    known = states() if estimator.states and states is not None else None
    told = Estimation(gamma, config.scale_rewards, 1e-4, config.pass_k, known, config.gigpo_weight)
    return estimator.function(rewards, lengths, group, told)


def _largest(returns: Tensor) -> float:
    """The size of the largest return, if that can be computed with."""
    largest = float(returns.abs().max()) if len(returns) else 0.0
    if not largest <= LARGEST_RETURN:
        raise TrainingError(
            f"the weighted sum of the rewards of a completion is {largest:g} in size, and at most {LARGEST_RETURN:g} "
            "can be computed with; lower reward_weights, or scale the rewards"
        )
    return largest


def _finite(advantages: Tensor, largest: float) -> Tensor:
    """The advantages in float32, from rewards of up to ``largest`` in size."""
    advantages = advantages.float()
    if not bool(advantages.isfinite().all()):
        raise TrainingError(
            f"advantages are not finite in float32, from rewards of up to {largest:g} in size; scale the rewards"
        )
    return advantages


def groups_with_signal(
    config: GRPOConfig, rewards: Tensor, weights: Tensor, group_size: int, own: TensorFunction | None = None
) -> Tensor:
    """``[P]`` bool: whether the rewards of a group give any of its samples an advantage.

    Rewards alone count, without what is added to them for length or divergence: those who judge said the same of all.

    Args:
        rewards: ``[P * group_size, F]``, NaN where a function does not apply. weights: ``[F]``.
    """
    ones = torch.ones(len(rewards), dtype=torch.int64)
    group = torch.arange(len(rewards) // group_size).repeat_interleave(group_size)
    returns = total(rewards, weights)
    advantages = estimate_advantages(config, rewards, weights, returns, ones, group, own=own)
    return (advantages.view(-1, group_size) != 0).any(1)

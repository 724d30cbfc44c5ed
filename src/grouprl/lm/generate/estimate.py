"""From rewards to advantages: which estimator of :mod:`grouprl.objective` the settings name."""

from __future__ import annotations

import torch
from torch import Tensor

from grouprl import objective
from grouprl.errors import TrainingError
from grouprl.lm.rewards.call import total
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective.estimators import ESTIMATORS, Estimation
from grouprl.objective.groups import LARGEST_RETURN
from grouprl.objective.packed import last_index
from grouprl.objective.user_functions import TensorFunction, own_advantages


def estimate_advantages(
    config: GRPOConfig, rewards: Tensor, weights: Tensor, returns: Tensor, lengths: Tensor, group: Tensor,
    penalties: Tensor | None = None, own: TensorFunction | None = None,
) -> Tensor:  # fmt: skip
    """Advantages ``[S]`` as the settings say, in float32.

    Args:
        rewards: ``[N, F]``, NaN where a function does not apply. weights: ``[F]``.
        returns: ``[N]`` their weighted sum. lengths, group: ``[N]``.
        penalties: ``[S]`` what is taken from the reward at each token (KL in the reward), or None.
        own: a user's estimator, in the place of the settings'.

    Raises TrainingError if rewards, penalties or advantages are too large to compute with.
    """
    largest = float(returns.abs().max()) if len(returns) else 0.0
    if not largest <= LARGEST_RETURN:
        raise TrainingError(
            f"the weighted sum of the rewards of a completion is {largest:g} in size, and at most {LARGEST_RETURN:g} "
            "can be computed with; lower reward_weights, or scale the rewards"
        )
    if penalties is not None and not bool(penalties.isfinite().all()):
        raise TrainingError(
            "the divergence to the reference is not finite: the policy has moved too far from it; lower learning_rate, "
            "raise beta, or set kl_estimator='k1'"
        )
    advantages = _advantages(config, rewards, weights, returns, lengths, group, penalties, own)
    if not bool(advantages.isfinite().all()):
        raise TrainingError(
            f"advantages are not finite in float32, from rewards of up to {largest:g} in size; scale the rewards"
        )
    return advantages


def _advantages(
    config: GRPOConfig, rewards: Tensor, weights: Tensor, returns: Tensor, lengths: Tensor, group: Tensor,
    penalties: Tensor | None, own: TensorFunction | None,
) -> Tensor:  # fmt: skip
    if own is None and config.multi_objective_aggregation == "normalize_then_sum":
        return objective.gdpo(rewards, weights, lengths, group).float()
    steps = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    steps[last_index(lengths)] = returns.double()
    if penalties is not None:
        steps -= penalties
    if own is not None:
        return own_advantages(own, steps, lengths, group).float()
    function = ESTIMATORS[config.advantage].function
    assert function is not None
    told = Estimation(scale_rewards=config.scale_rewards, eps=1e-4, pass_k=config.pass_k)
    return function(steps, lengths, group, told).float()


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

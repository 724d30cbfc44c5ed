"""From rewards to advantages: which estimator of :mod:`grouprl.objective` the settings name."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from grouprl import objective
from grouprl.lm.rewards.call import total
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.user_functions import NOTHING, Custom
from grouprl.objective.packed import last_index


def estimate_advantages(
    config: GRPOConfig, rewards: Tensor, weights: Tensor, returns: Tensor, lengths: Tensor, group: Tensor,
    penalties: Tensor | None = None, custom: Custom = NOTHING,
) -> Tensor:  # fmt: skip
    """Advantages ``[S]`` as the settings say, in float32.

    Args:
        rewards: ``[N, F]``, NaN where a function does not apply. weights: ``[F]``.
        returns: ``[N]`` their weighted sum. lengths, group: ``[N]``.
        penalties: ``[S]`` what is taken from the reward at each token (KL in the reward), or None.
        custom: may hold an estimator that takes the place of the settings'.
    """
    if custom.advantage is None and config.multi_objective_aggregation == "normalize_then_sum":
        return objective.gdpo(rewards, weights, lengths, group).float()
    steps = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    steps[last_index(lengths)] = returns.double()
    if penalties is not None:
        steps -= penalties
    name = config.advantage
    if custom.advantage is not None:
        advantages = custom.advantages(steps, lengths, group)
    elif name == "group":
        advantages = objective.outcome(steps, lengths, group, scale=config.scale_rewards, eps=1e-4)
    elif name == "leave_one_out":
        advantages = objective.leave_one_out(steps, lengths, group)
    elif name == "opo":
        advantages = objective.opo(steps, lengths, group)
    elif name == "maxrl":
        advantages = objective.maxrl(steps, lengths, group)
    elif name == "pass_at_k":
        advantages = objective.pass_at_k(steps, lengths, group, config.pass_k)
    elif name == "reinforce_pp" or name == "reinforce_pp_baseline":
        advantages = objective.reinforce_pp(steps, lengths, group, baseline=name == "reinforce_pp_baseline")
    else:
        assert_never(name)
    return advantages.float()


def groups_with_signal(
    config: GRPOConfig, rewards: Tensor, weights: Tensor, group_size: int, custom: Custom = NOTHING
) -> Tensor:
    """``[P]`` bool: whether the rewards of a group give any of its samples an advantage.

    Rewards alone count, without what is added to them for length or divergence: those who judge said the same of all.

    Args:
        rewards: ``[P * group_size, F]``, NaN where a function does not apply. weights: ``[F]``.
    """
    ones = torch.ones(len(rewards), dtype=torch.int64)
    group = torch.arange(len(rewards) // group_size).repeat_interleave(group_size)
    returns = total(rewards, weights)
    advantages = estimate_advantages(config, rewards, weights, returns, ones, group, custom=custom)
    return (advantages.view(-1, group_size) != 0).any(1)

"""The action that a policy takes where it is asked, outside of training and evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.finite import bad_observation, check_params
from grouprl.envs.masks import many_masks
from grouprl.envs.policy import Policy
from grouprl.errors import UsageError


def chosen_action(
    policy: Policy,
    actions: ActionCodec,
    observation: Any,
    rng: np.random.Generator,
    deterministic: bool,
    action_masks: Any,
    masks_in_info: bool,
) -> Any:
    """The action for one observation, or the actions for a batch of them: see :meth:`grouprl.envs.grpo.GRPO.predict`.

    Args:
        policy: acts.
        actions: its action space.
        observation, deterministic, action_masks: as for ``predict``.
        rng: draws what is sampled.
        masks_in_info: the environment of training named the valid actions in ``info``, so that a mask must be given.
    """
    observations = policy.observations
    batched = observations.is_batched(observation)
    encoded = observations.encode(observation) if batched else observations.encode_single(observation)
    if (found := bad_observation(observations, encoded)) is not None:
        raise UsageError(f"the observation given holds {found[1]}; observations must be finite")
    params = policy.infer(policy.prepare(encoded))
    check_params(params, encoded, policy, np.ones(len(params), bool), "this call")
    distribution = policy.distribution
    if action_masks is not None and actions.mask_size:
        mask: Any = many_masks(action_masks, len(params), actions.mask_size)
    elif action_masks is not None:
        mask = action_masks  # refused below
    else:
        mask = observations.mask(observation if batched else observations.batch_of_one(observation))
    if mask is not None:
        distribution.check_mask(mask)
        params = distribution.apply_mask(params, mask)
    elif masks_in_info:
        raise UsageError(
            "the environment of training named the valid actions; give them: agent.predict(observation, "
            "action_masks=info['action_mask']), or what its action_masks() returns (ones allow every action)"
        )
    drawn = distribution.mode(params) if deterministic else distribution.sample(params, rng)
    env_actions = actions.to_env(drawn)
    return env_actions if batched else env_actions[0]

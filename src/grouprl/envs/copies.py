"""Copies of an agent: by ``copy``, by ``pickle``, into another process."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from grouprl.envs.grpo import GRPO


def state_of(agent: GRPO) -> dict[str, Any]:
    """Everything but the environments; of these an id or a function that makes them is kept, and an object is not.

    The optimizer and compiled functions hold the very parameters of an agent. So a copy is assembled anew, and then
    takes the values.
    """
    tensors, state = agent.loop.state_without_environments()
    return {
        "description": replace(agent._held.description, num_timesteps=agent.num_timesteps),
        "network": agent._network,
        "functions": agent.loop.functions,
        "policy": _own(agent.policy.state_dict()),
        "tensors": _own(tensors),
        "loop": copy.deepcopy(state),
        "predict": agent._predict_rng.bit_generator.state,
        "env": agent._held.given if agent._held.made_here else None,
        "extra": copy.deepcopy(agent.extra),
    }


def restore(agent: GRPO, state: dict[str, Any]) -> None:
    """Make of ``agent``, which holds nothing yet, what :func:`state_of` described."""
    agent._assemble(state["description"], state["network"], state["functions"])
    agent.policy.load_state_dict(state["policy"])
    agent.loop.load_without_environments(state["tensors"], state["loop"])
    agent._predict_rng.bit_generator.state = state["predict"]
    agent._held.given, agent.extra = state["env"], state["extra"]


def picklable(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` without a function for environments that cannot be pickled, such as a lambda."""
    try:
        pickle.dumps(state["env"])
    except Exception:  # pickle's errors are of many kinds
        return state | {"env": None}
    return state


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}

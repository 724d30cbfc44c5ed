"""Wrappers that keep running statistics, of which no file knows: found, and told with what to do instead."""

from __future__ import annotations

from typing import Any

from gymnasium import Env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorWrapper

NAMES = {"obs_rms": "observations", "return_rms": "rewards"}
"""Attributes of wrappers such as Gymnasium's NormalizeObservation and NormalizeReward, and what these normalise."""

INSTEAD = {
    "obs_rms": "grouprl normalises observations by itself and saves that with the policy (normalize_observations)",
    "return_rms": "the robust default standardises advantages, and so takes rewards of any scale",
}


def running_statistics(venv: VectorEnv[Any, Any, Any]) -> str | None:
    """What wrappers around or within ``venv`` keep, and what does without; None where they keep nothing.

    Found are those of :data:`NAMES`, also in worker processes.
    """
    found: set[str] = set()
    layer: Any = venv
    while isinstance(layer, VectorWrapper):
        found |= NAMES.keys() & vars(layer).keys()
        layer = layer.env
    own = getattr(layer, "own", layer)  # of several processes', those of this one
    if isinstance(own, SyncVectorEnv):
        wrapped = [env for env in own.envs if isinstance(env, Env)]
        found |= {name for name in NAMES if any(env.has_wrapper_attr(name) for env in wrapped)}
    elif isinstance(own, AsyncVectorEnv):
        found |= {name for name in NAMES if any(own.call("has_wrapper_attr", name))}
    kept = [name for name in NAMES if name in found]
    if not kept:
        return None
    what = " and ".join(f"{NAMES[name]} ({name})" for name in kept)
    return (
        f"a wrapper of the environment keeps running statistics of {what}, which no checkpoint and no model holds. "
        f"Leave it out: {'; '.join(INSTEAD[name] for name in kept)}"
    )

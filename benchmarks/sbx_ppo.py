"""SBX's PPO, Stable-Baselines3's in JAX, for worker_peers.py: made of the same settings, or refused.

SBX accepts Stable-Baselines3's arguments. Some of them it does not use, or uses in another way, and it says nothing
then. Two things no argument decides, and they stay as SBX has them: weights begin as flax draws them, where those of
Stable-Baselines3 are orthogonal or torch's, and the gradients of policy and value function are clipped apart from each
other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

TAKEN = (
    "learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "normalize_advantage",
    "ent_coef", "vf_coef", "max_grad_norm", "seed", "device", "policy_kwargs",
)  # fmt: skip
TAKEN_BY_POLICY = ("net_arch", "activation_fn", "log_std_init", "ortho_init")


def refused(settings: Mapping[str, Any]) -> list[str]:
    """The settings that SBX's PPO accepts, and with which it does not do what Stable-Baselines3's does.

    gSDE is among them: SBX only holds the noise of an action for some steps, and its noise is no function of the state.
    ``ortho_init`` is refused where it is true, since SBX draws only the actor's last layer so. Where it is not said it
    is true in Stable-Baselines3 and false in SBX: defaults are each library's own.
    """
    policy: Mapping[str, Any] = settings.get("policy_kwargs", {})
    names = [name for name in settings if name not in TAKEN]
    names += [f"policy_kwargs.{name}" for name in policy if name not in TAKEN_BY_POLICY]
    return names + (["policy_kwargs.ortho_init"] if policy.get("ortho_init") else [])


def make(policy: str, venv: Any, **settings: Any) -> Any:
    """A model of SBX, which computes with one thread, from Stable-Baselines3's arguments.

    Raises ValueError for settings that are :func:`refused`, AttributeError for an activation that flax does not have.
    """
    if names := refused(settings):
        raise ValueError(
            f"SBX's PPO does not do what Stable-Baselines3's does with {', '.join(names)}; leave an environment that "
            f"needs this out of its subjects. It takes {', '.join(TAKEN)}, and policy_kwargs of "
            f"{', '.join(TAKEN_BY_POLICY)}"
        )
    # XLA reads these once, when jax is first used.
    os.environ["PJRT_NPROC"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    import flax.linen
    from sbx import PPO

    kwargs = dict(settings.pop("policy_kwargs", {}))
    if "activation_fn" in kwargs:  # a class of torch.nn; flax has a function of the same name in lower case
        kwargs["activation_fn"] = getattr(flax.linen, kwargs["activation_fn"].__name__.lower())
    return PPO(policy, venv, policy_kwargs=kwargs, **settings)


def parameters(policy: Any) -> int:
    """How many numbers the networks of a policy of SBX have, of the actor and of the value function."""
    import jax

    states = (policy.actor_state, policy.vf_state)
    return sum(leaf.size for state in states for leaf in jax.tree_util.tree_leaves(state.params))

"""Agents made from files: from a saved model, or from a checkpoint to go on training from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from grouprl.envs import checkpoint
from grouprl.envs.config import GRPOConfig
from grouprl.envs.description import Description
from grouprl.envs.env_kwargs import was_an_id
from grouprl.envs.model_file import computed_otherwise, fill_policy, listed
from grouprl.envs.policy import Network
from grouprl.envs.vector import EnvLike
from grouprl.errors import UsageError, shown
from grouprl.objective.user_functions import NO_USER_FUNCTIONS, UserFunctions

if TYPE_CHECKING:
    from grouprl.envs.grpo import GRPO

AnyGRPO = TypeVar("AnyGRPO", bound="GRPO")


def from_model(
    cls: type[AnyGRPO],
    path: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    network: Network | None,
    functions: UserFunctions,
    settings: Mapping[str, Any],
) -> AnyGRPO:
    """An agent of class ``cls`` with the policy among ``tensors``, described by ``meta``, both read from ``path``.

    It has no environment yet.

    Args:
        cls: the class of the agent.
        path: named in errors.
        tensors, meta: what the file holds.
        network, functions: what the user gives of their own.
        settings: override the saved ones.

    Raises:
        UsageError: ``meta`` describes no agent (DamagedFileError), a setting is not allowed, the weights do not fit it
            or make another policy with it, or the policy was trained with a network of the user's and ``network`` is
            None.
    """
    saved = Description.from_json(path, meta, settings)
    if saved.custom_network and network is None:
        raise UsageError(
            f"{path} was trained with a custom network; pass the same builder as network=..., also to "
            "grouprl.envs.training.resume; to grouprl export as --network module:builder"
        )
    agent = cls.__new__(cls)
    agent._assemble(
        replace(
            saved,
            custom_network=network is not None,
            custom_advantage=saved.custom_advantage or functions.advantage is not None,
            custom_surrogate=saved.custom_surrogate or functions.surrogate is not None,
        ),
        network,
        functions,
    )
    try:
        fill_policy(agent.policy, tensors, path)
    except UsageError:
        if not settings:
            raise
        own = from_model(cls, path, tensors, meta, network, functions, {}).config.model_dump()  # or it is the file
        given = {name: value for name, value in agent.config.model_dump().items() if value != own[name]}
        raise UsageError(
            f"the weights in {path} do not fit {listed(given)}; they were saved with "
            f"{listed({name: own[name] for name in given})}"
        ) from None
    if other := computed_otherwise(agent.policy, meta, agent.config):
        chosen = listed({name: getattr(agent.config, name) for name in other})
        raise UsageError(
            f"{chosen} would make another policy of the weights in {path}, which were trained with {listed(other)}; "
            f"leave it out, or train a new agent with it: GRPO(env, {chosen})"
        )
    return agent


def changed_settings(path: Path, meta: Mapping[str, Any], config: GRPOConfig) -> list[str]:
    """The settings whose value in ``config`` is another than the file at ``path`` has, as its ``meta`` says."""
    saved = Description.from_json(path, meta, {}).config
    return [name for name in type(config).model_fields if getattr(config, name) != getattr(saved, name)]


def from_checkpoint(
    cls: type[AnyGRPO],
    path: Path,
    env: EnvLike | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    network: Network | None = None,
    functions: UserFunctions = NO_USER_FUNCTIONS,
) -> AnyGRPO:
    """An agent of class ``cls`` that goes on from the checkpoint at ``path``, on ``env`` or on the one it names.

    Raises:
        UsageError: not a checkpoint, or a damaged one (DamagedFileError); its environment cannot be made.
    """
    tensors, meta = checkpoint.read(path)
    agent = from_model(cls, path, tensors, meta, network, functions, {})
    set_environment(agent, env, env_kwargs)
    try:
        agent.extra = checkpoint.restore(path, agent.loop, tensors, meta)
    except BaseException:
        agent.close()
        raise
    return agent


def chosen_environment(
    agent: GRPO, env: EnvLike | None, env_kwargs: Mapping[str, Any] | None
) -> tuple[EnvLike, Mapping[str, Any] | None, str]:
    """``env``; or the id that ``agent`` was trained on, where there are arguments alone; or its own environment.

    Returns:
        The environment, the arguments of its constructor, and how to vectorise it for evaluations.

    Raises:
        UsageError: there are arguments, and the agent was trained on no id; or there is no environment.
    """
    if env is not None:
        return env, env_kwargs, "auto"
    own = agent.config.how_to_evaluate
    if env_kwargs is None:
        return *agent.where(), own
    if not was_an_id(agent.env_lost):
        raise UsageError(
            f"env_kwargs={shown(env_kwargs)} only goes with an environment id, and this agent was trained on none: "
            f"{agent.env_lost}; give env, such as lambda: MyEnv(...)"
        )
    return agent.env_id, env_kwargs, own


def set_environment(agent: GRPO, env: EnvLike | None, env_kwargs: Mapping[str, Any] | None) -> None:
    """Train ``agent`` on what :func:`chosen_environment` says.

    Raises:
        UsageError: there is no such environment, it cannot be made, or has other spaces.
    """
    chosen, kwargs, _ = chosen_environment(agent, env, env_kwargs)
    agent.set_env(chosen, kwargs)

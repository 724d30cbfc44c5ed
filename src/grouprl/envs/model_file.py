"""Which file a path means, and how the policy in it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from grouprl.envs.config import GRPOConfig
from grouprl.envs.mlp import MLP
from grouprl.envs.policy import Policy
from grouprl.errors import DamagedFileError, UsageError, shown
from grouprl.runs import RunFolder
from grouprl.runs.folder import newest_good
from grouprl.runs.state import check_like, load_state, taking_up

POLICY_PREFIX = "policy."
"""What the names of the policy's tensors begin with in a checkpoint. In a saved model they have no prefix."""


def model_file(path: Path) -> Path:
    """The file that ``path`` means: the file itself, with or without its suffix, or the model of a run folder.

    A folder that is no run may lie beside a file of its name.

    A run that was killed before its end has no model; its newest readable checkpoint is taken instead. The file that is
    returned need not exist.
    """
    path = path if path.name else path.absolute()  # "." has no name of its own
    beside = path.parent / f"{path.name}.safetensors"
    if not path.is_dir():
        return path if path.suffix == ".safetensors" or path.exists() else beside
    model = path / "model.safetensors"
    of_run = model if os.path.lexists(model) else RunFolder(path).latest_checkpoint()
    if not beside.exists():
        return of_run or model
    if of_run is not None:
        raise UsageError(
            f"{path} is a run folder, and there is a saved model {beside} too; name the file that you mean"
        )
    return beside


@contextmanager
def offering_another(file: Path) -> Iterator[None]:
    """Around code that reads ``file``: if that is damaged, the error also names the newest good checkpoint of its run.

    Raises:
        DamagedFileError: as the code within.
    """
    try:
        yield
    except DamagedFileError as error:
        run = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        others = [path for path in RunFolder(run).checkpoints() if path != file]
        found = newest_good(others, load_state)
        if found is None:
            raise
        raise DamagedFileError(f"{error} The newest good checkpoint of this run is {found[0]}.") from error


def load_policy(policy: Policy, path: Path, config: GRPOConfig) -> None:
    """Load the policy saved at ``path`` (a file or a run folder) into ``policy``, which was made by ``config``.

    Raises:
        UsageError: no such file, a foreign one, or one for other spaces or another network; or the saved policy
            computes otherwise from its weights than ``policy`` does.
    """
    tensors, meta = load_state(model_file(path))
    with taking_up(path):
        saved = computed_otherwise(policy, meta, config)
    if saved:
        raise UsageError(
            f"the policy in {path} was trained with {listed(saved)}, and this agent has "
            f"{listed({name: getattr(config, name) for name in saved})}, with which its weights make another policy; "
            "give this agent the setting of the saved one, or name another policy"
        )
    fill_policy(policy, tensors, path)


def computed_otherwise(policy: Policy, meta: Mapping[str, Any], config: GRPOConfig) -> dict[str, Any]:
    """Settings that would make another policy of saved weights although the weights fit, with the values as saved.

    Args:
        policy: made by ``config``, to be filled with the weights.
        meta: what the file says of itself.
        config: the settings that ``policy`` has.
    """
    saved, codec = meta["config"], policy.observations
    counts = {
        "activation": isinstance(policy.network, MLP),
        "normalize_observations": bool((codec.normalise | (codec.scale != 1)).any()),
    }
    return {
        name: saved[name]
        for name, has_effect in counts.items()
        if has_effect and name in saved and saved[name] != getattr(config, name)
    }


def listed(settings: Mapping[str, Any]) -> str:
    """Settings with their values, for a message."""
    return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())


def fill_policy(policy: Policy, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give ``policy`` the parameters and statistics among ``tensors``, those of a saved model or of a checkpoint.

    Args:
        policy: takes them.
        tensors: what the file at ``path`` holds, by name.
        path: named in the error.

    Raises:
        UsageError: the tensors are those of a policy for other spaces or with another network.
    """
    own = {key.removeprefix(POLICY_PREFIX): value for key, value in tensors.items() if key.startswith(POLICY_PREFIX)}
    if own and path.name == "model.safetensors" and RunFolder(path.parent).checkpoints():
        raise DamagedFileError(
            f"{path} holds a checkpoint, and not the model that its run ended with: something was put in its place."
        )
    own = own or dict(tensors)
    check_like(path, own, None, policy.state_dict())
    try:
        policy.load_state_dict(own)
    except RuntimeError as error:
        raise UsageError(f"the policy in {path} does not fit this one: {' '.join(str(error).split())}") from None

"""Checkpoints a run resumes from bit for bit.

The environments themselves cannot be written without pickling user code. Written instead is the seed they were last
reset from and every action since; reading repeats these. So that the repetition stays short, a checkpoint taken on
schedule begins fresh episodes once the last reset lies many time limits back: the run that goes on and a resumed one
then both continue from the same new seed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
from torch import Tensor

from grouprl.envs.finite import check_policy
from grouprl.envs.loop import Loop
from grouprl.envs.running_statistics import running_statistics
from grouprl.errors import DamagedFileError, TrainingError
from grouprl.machine.record import describe_machine, other_machine
from grouprl.runs.state import check_like, load_state, save_state, taking_up

_log = logging.getLogger("grouprl")


def write(path: Path, loop: Loop, may_restart: bool, description: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Write ``loop`` and its environments to ``path``; ``may_restart`` if the checkpoint is on schedule.

    Raises TrainingError, and leaves an older file as it is, if a number of the policy is not finite.
    """
    check_policy(loop.policy)
    loop.bound_replay(may_restart)
    tensors, state = loop.state()
    tensors |= {f"policy.{key}": value for key, value in loop.policy.state_dict().items()}
    about = {**description, "machine": _machine(loop), "state": {**state, "extra": dict(extra)}}
    loop.ranks.once(lambda: save_state(path, tensors, about))


def _machine(loop: Loop) -> dict[str, Any]:
    compiled = loop.learner.optimizer.native
    return describe_machine(compiled=compiled, device=loop.config.device, gymnasium=gymnasium.__version__)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write` wrote to ``path``: tensors, and the description with its ``state``.

    Raises:
        DamagedFileError: not a checkpoint, or a damaged one.
    """
    tensors, meta = load_state(path)
    if meta.get("kind") != "checkpoint":
        raise DamagedFileError(f"{path} is a saved model, not a checkpoint; GRPO.load reads it")
    return tensors, meta


def restore(path: Path, loop: Loop, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Put what :func:`read` gave into ``loop``, whose policy and environments are those of the run; returns ``extra``.

    Raises:
        DamagedFileError: something is missing there, or is not of the kind or shape that a run saves.
    """
    like, state = loop.state_without_environments()
    with taking_up(path):
        saved = meta["state"]
        check_like(path, tensors, saved, like, state)
        try:
            loop.load(tensors, saved)
        except TrainingError as error:
            raise DamagedFileError(f"the actions in {path} cannot be repeated: {error}") from error
        others = other_machine(meta["machine"], _machine(loop))
        if others is not None:
            _log.warning("numbers will differ from those of a run that never stopped: %s", others)
        assert loop.collector is not None
        if (kept := running_statistics(loop.collector.venv)) is not None:
            _log.warning("numbers will differ from those of a run that never stopped: %s", kept)
        return dict(saved["extra"])

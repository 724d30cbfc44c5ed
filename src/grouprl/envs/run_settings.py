"""What a run shall do beside learning, and how config.yaml says all that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from grouprl.envs.arguments import whole_number, yes_or_no
from grouprl.envs.config import GRPOConfig
from grouprl.envs.env_kwargs import to_json
from grouprl.envs.grpo import GRPO
from grouprl.envs.vector import reward_threshold
from grouprl.errors import UsageError, shown
from grouprl.runs.trackers import check_trackers

Beside = dict[str, list[str]]
"""Names of the callbacks ``before`` and ``after`` that which records a run, in their order."""


@dataclass(frozen=True)
class RunSettings:
    """What a run does beside learning.

    Attributes:
        total_timesteps: environment steps to train for.
        eval_every: steps between periodic greedy evaluations (counted from 0); each update at most once.
        eval_episodes: episodes of a periodic evaluation; final_episodes: of the last one.
        checkpoint_every: steps between checkpoints; keep_checkpoints: how many of the newest stay.
        track: ``tensorboard``, ``wandb`` or ``none``.
        video: whether to film one episode at the end.

    Raises:
        UsageError: a number is not whole or below 1, a tracker is none, or ``video`` is neither True nor False.
    """

    total_timesteps: int
    eval_every: int
    eval_episodes: int = 20
    final_episodes: int = 100
    checkpoint_every: int = 100_000
    keep_checkpoints: int = 3
    track: tuple[str, ...] = ("tensorboard",)
    video: bool = True

    def __post_init__(self) -> None:
        for name in (
            "total_timesteps",
            "eval_every",
            "eval_episodes",
            "final_episodes",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        check_trackers(self.track)
        object.__setattr__(self, "track", tuple(self.track))
        object.__setattr__(self, "video", yes_or_no("video", self.video))


def plan(total: int, given: Mapping[str, Any], eval_every: int | None = None) -> RunSettings:
    """The settings of a run of ``total`` steps, with ``given`` fields; 20 evaluations and 10 checkpoints by default.

    Raises:
        UsageError: there is no such field, or a value is not allowed.
    """
    if unknown := [name for name in given if name not in RunSettings.__dataclass_fields__]:
        raise UsageError(
            f"unknown settings of a run: {', '.join(map(shown, unknown))}; known ones: "
            f"{', '.join(RunSettings.__dataclass_fields__)}"
        )
    total = whole_number("total_timesteps", total, least=1)
    usual = {
        "total_timesteps": total,
        "eval_every": eval_every or max(1, total // 20),
        "checkpoint_every": max(1, total // 10),
    }
    return RunSettings(**{**usual, **given})


def as_written(
    agent: GRPO, run: RunSettings, env_id: str, preset: str | None, functions: Mapping[str, str] | None = None,
    beside: Beside | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What config.yaml says of a run: enough to do it again, if its environment can be made by ``env_id``.

    What was the user's own, and no name in ``functions`` finds again, is named under ``own``; callbacks ``beside`` that
    which records the run, under ``callbacks``.
    """
    named = dict(functions or {})
    given = {
        "network": agent._network,
        "advantage_function": agent.loop.functions.advantage,
        "surrogate_function": agent.loop.functions.surrogate,
    }
    own = {name: called(value) for name, value in given.items() if value is not None and name not in named}
    return {
        "grouprl": version("grouprl"),
        "env_id": env_id,
        "preset": preset,
        "seed": agent.config.seed,
        "env_kwargs": {} if agent.env_lost else to_json(agent.env_kwargs),
        "run": {**run.__dict__, "track": list(run.track)},
        **({"begun_at": agent.num_timesteps} if agent.num_timesteps else {}),
        "reward_threshold": reward_threshold(agent.where()[0]),
        "config": agent.config.model_dump(mode="json"),
        **({"functions": named} if named else {}),
        **({"own": own} if own else {}),
        **({"callbacks": beside} if beside and any(beside.values()) else {}),
    }


def called(function: Any) -> str:
    """``module:name`` of a function or class; of another object that of its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def default_settings() -> dict[str, Any]:
    """Every setting of learning and its default, as config.yaml holds them."""
    return GRPOConfig().model_dump(mode="json")

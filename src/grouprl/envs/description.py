"""What a saved agent says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium import Space

from grouprl.envs.config import GRPOConfig, make_config
from grouprl.envs.env_kwargs import from_json, to_json
from grouprl.envs.space_json import space_from_json, space_to_json
from grouprl.errors import DamagedFileError
from grouprl.runs.state import taking_up


@dataclass(frozen=True)
class Description:
    """All that an agent is made of, apart from numbers that were learned and functions of the user's.

    Attributes:
        config: its settings.
        observation_space, action_space: of one environment.
        env_id: what its environment is called, or "" if it has had none. env_kwargs: for its constructor.
        env_lost: why its environment cannot be made again by ``env_id`` and ``env_kwargs``, or "" if it can.
        custom_network, custom_advantage, custom_surrogate: whether the user gave a network, an estimator, a surrogate.
        masks_in_info: whether its environment named the valid actions beside the observation.
        num_timesteps: environment steps of training so far.
    """

    config: GRPOConfig
    observation_space: Space[Any]
    action_space: Space[Any]
    env_id: str
    env_kwargs: Mapping[str, Any]
    custom_network: bool
    custom_advantage: bool
    custom_surrogate: bool
    env_lost: str = ""
    masks_in_info: bool = False
    num_timesteps: int = 0

    def to_json(self, kind: str) -> dict[str, Any]:
        """As JSON, for a file of ``kind`` "model" or "checkpoint"."""
        return {
            "kind": kind,
            "env_id": self.env_id,
            "env_kwargs": {} if self.env_lost else to_json(self.env_kwargs),
            "env_lost": self.env_lost,
            "config": self.config.model_dump(mode="json"),
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "custom_network": self.custom_network,
            "custom_advantage": self.custom_advantage,
            "custom_surrogate": self.custom_surrogate,
            "masks_in_info": self.masks_in_info,
            "num_timesteps": self.num_timesteps,
        }

    @classmethod
    def from_json(cls, path: Path, meta: Mapping[str, Any], settings: Mapping[str, Any]) -> Description:
        """The inverse of :meth:`to_json`.

        Args:
            path: where ``meta`` was read; named in the error.
            meta: what :meth:`to_json` gave.
            settings: override the saved ones.

        Raises:
            UsageError: ``meta`` describes no agent (DamagedFileError), or a setting is not allowed.
        """
        missing = {"config", "observation_space", "action_space", "env_id"} - set(meta)
        if missing:
            raise DamagedFileError(f"{path} is not a saved environment policy (it lacks {', '.join(sorted(missing))})")
        with taking_up(path):
            return cls(
                config=make_config({**meta["config"], **settings}),
                observation_space=space_from_json(meta["observation_space"]),
                action_space=space_from_json(meta["action_space"]),
                env_id=str(meta["env_id"]),
                env_kwargs=from_json(meta["env_kwargs"]),
                env_lost=str(meta["env_lost"]),
                custom_network=bool(meta["custom_network"]),
                custom_advantage=bool(meta["custom_advantage"]),
                custom_surrogate=bool(meta["custom_surrogate"]),
                masks_in_info=bool(meta["masks_in_info"]),
                num_timesteps=int(meta["num_timesteps"]),
            )

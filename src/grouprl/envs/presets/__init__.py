"""Presets: one YAML file per environment, with the result to expect and how it was measured."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from grouprl.errors import UsageError

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    ``config`` holds only what differs from :class:`~grouprl.envs.config.GRPOConfig`'s defaults; ``env_kwargs`` go to
    the environment; ``expect`` says what it reached, over which seeds, and the command that shows it.
    """

    name: str
    env_id: str
    total_timesteps: int
    config: dict[str, Any] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_every: int | None = None
    needs: str | None = None
    about: str = ""
    expect: dict[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """The names of all presets, sorted."""
    folder = resources.files(__name__)
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(name: str) -> Preset:
    """Read one preset.

    Raises:
        UsageError: there is none of that name.
    """
    if not isinstance(name, str):
        raise UsageError(f"preset={name!r} must be a name, 'auto' or None; there are: {', '.join(names())}")
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names())}"
        raise UsageError(f"no preset {name!r}; {hint}")
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return Preset(name=name, **yaml.safe_load(text))


def warn_of_another_environment(preset: Preset, spec: EnvSpec | None) -> None:
    """Warn if a preset is for an environment made with other arguments than the one given.

    Args:
        preset: its arguments go only to an environment that is made from an id.
        spec: of the environment given, if it has one.
    """
    have = {} if spec is None else {**spec.kwargs, "max_episode_steps": spec.max_episode_steps}
    missing = {key: value for key, value in preset.env_kwargs.items() if have.get(key) != value}
    if missing:
        arguments = ", ".join(f"{key}={value!r}" for key, value in missing.items())
        warnings.warn(
            f"the preset {preset.name} is for {preset.env_id} made with {arguments}; the environment given is "
            "taken as it is",
            stacklevel=3,
        )


def resolve(env_id: str | None, preset: str | None) -> Preset | None:
    """The preset to use: by name; for ``"auto"`` the one named like the environment, if any; None for None."""
    if preset is None or preset == "default":
        return None
    if preset == "auto":
        return load(env_id) if env_id in names() else None
    return load(preset)

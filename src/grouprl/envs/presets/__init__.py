"""Presets: one YAML file per environment, with the result to expect and how it was measured."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from grouprl.envs.config import NEEDS_WHOLE_EPISODES, GRPOConfig, make_config
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


def configure(preset: Preset | None, settings: Mapping[str, Any]) -> GRPOConfig:
    """The configuration of a preset with settings that somebody chose, which count more.

    A preset may collect pieces of episodes, or learn from earlier batches, for the estimator that it is made for. Where
    another one is chosen that cannot, the default takes the place of what the preset says, and a warning tells so.

    Raises:
        UsageError: values that are not allowed, or do not go together; where the preset has part in it, with its name.
    """
    if preset is None:
        return make_config(settings)
    left_out = _ruled_out(preset, settings)
    kept = {name: value for name, value in preset.config.items() if name not in left_out}
    try:
        config = make_config({**kept, **settings})
    except UsageError as error:
        make_config(settings)  # where these alone are wrong, the preset has no part in it
        held = ", ".join(f"{name}={value!r}" for name, value in kept.items() if name not in settings)
        raise UsageError(
            f"{error}; the preset {preset.name} sets {held}: choose other values for these, or preset=default"
        ) from error
    for name, why in left_out.items():
        warnings.warn(
            f"{name}={preset.config[name]!r} of the preset {preset.name} does not go with {why}, and is left out; "
            f"{name} is {getattr(config, name)!r}",
            stacklevel=3,
        )
    return config


def _ruled_out(preset: Preset, settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings of a preset that do not go with a chosen estimator, or with groups, by name: what rules them out."""
    found: dict[str, str] = {}
    advantage = settings.get("advantage")
    if preset.config.get("collect") == "segments":
        if settings.get("group_size") is not None:
            found["collect"] = f"group_size={settings['group_size']!r}"
        elif advantage in NEEDS_WHOLE_EPISODES:
            found["collect"] = f"advantage={advantage!r}"
    if preset.config.get("reuse", 1) > 1 and advantage not in (None, "baseline"):
        found["reuse"] = f"advantage={advantage!r}"
    return {name: why for name, why in found.items() if name not in settings}

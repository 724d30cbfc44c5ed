"""Presets: one YAML file per environment, with the result to expect and how it was measured."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from grouprl.errors import UsageError


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


_RENAMED = {"tutorial": "script", "chapter": "formula"}


def names() -> list[str]:
    """The names of all presets, sorted."""
    folder = resources.files(__name__)
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(name: str) -> Preset:
    """Read one preset.

    Raises:
        UsageError: there is none of that name.
    """
    if name in _RENAMED:
        raise UsageError(f"the preset {name!r} is called {_RENAMED[name]!r} now")
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names())}"
        raise UsageError(f"no preset {name!r}; {hint}")
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return Preset(name=name, **yaml.safe_load(text))


def resolve(env_id: str | None, preset: str | None) -> Preset | None:
    """The preset to use: by name; for ``"auto"`` the one named like the environment, if any; None for None."""
    if preset is None or preset == "default":
        return None
    if preset == "auto":
        return load(env_id) if env_id in names() else None
    return load(preset)

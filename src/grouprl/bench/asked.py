"""What a sweep is asked for: an environment, a recipe or a file, and what the command line says on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grouprl.bench.cells import ENVIRONMENTS, LANGUAGE, Cell, parse_seeds
from grouprl.bench.plan import FUNCTIONS, checksum, preset_of, ready_made, subject_fields
from grouprl.bench.space import Space
from grouprl.bench.sweep import Sweep
from grouprl.bench.values import mapping, whole
from grouprl.errors import UsageError, shown
from grouprl.reading import read_yaml
from grouprl.runs.files import user_path

KEYS = (
    "environment", "env_kwargs", "recipe", "preset", "set", "seeds", "steps", "sampler", "trials", "metric", "prune",
    "episodes",
)  # fmt: skip
_TRIALS, _FILES = 20, (".yaml", ".yml")


def asked(what: str, options: Mapping[str, Any]) -> Sweep:
    """The sweep of an environment, a preset, a recipe, or of a YAML file of the ``KEYS``.

    Args:
        options: values by the same keys that win over the file's; None: not said.

    Raises UsageError for what is none of them, or for what it must not hold.
    """
    given = {**_source(what), **{key: value for key, value in options.items() if value is not None}}
    arena = LANGUAGE if given.get("recipe") is not None else ENVIRONMENTS
    subject = given.get("recipe") if arena == LANGUAGE else given.get("environment")
    if not isinstance(subject, str):
        raise UsageError(f"{what} must name an environment or a recipe, as text")
    about = subject_fields(subject, arena, given, None)
    if about["steps"] is None:
        raise UsageError(f"say for how many steps: {subject} has no preset that does; --steps 100000")
    about["steps"] = whole(about["steps"], "steps")
    space = Space.read({**_file_set(given), **given.get("of_command", {})})
    functions = {name: str(value) for name, value in space.fixed.items() if name in FUNCTIONS}
    if wrong := [name for name in space.varied if name in FUNCTIONS]:
        raise UsageError(f"{wrong[0]} cannot be swept; compare functions with grouprl bench")
    fixed = {name: value for name, value in space.fixed.items() if name not in FUNCTIONS}
    preset = preset_of(given.get("preset", "auto"), subject) if arena == ENVIRONMENTS else None
    path = user_path(what)
    folder = path.absolute().parent if path.suffix in _FILES else None
    cell = Cell(
        "", subject, arena, seed=0, functions=functions, code=checksum(functions, about.get("env_id"), folder),
        folder=str(folder or ""), preset=preset, ready_made=ready_made(preset, about.get("recipe")),
        episodes=whole(given.get("episodes", 100), "episodes"), **about,
    )  # fmt: skip
    sampler = str(given.get("sampler", "tpe" if space.ranges else "grid"))
    if sampler == "grid" and given.get("trials") is not None:
        raise UsageError(
            f"trials={shown(given['trials'])} is for random and tpe; a grid tries all {len(space.grid())} settings; "
            "set sampler=random, or leave trials out"
        )
    if not isinstance(given.get("prune", False), bool):
        raise UsageError(f"prune is {shown(given['prune'])}, and must be true or false, without quotes")
    trials = len(space.grid()) if sampler == "grid" else whole(given.get("trials", _TRIALS), "trials")
    return Sweep(
        cell, replace(space, fixed=fixed), parse_seeds(given.get("seeds", "0-4")), sampler, trials,
        metric=str(given.get("metric", "greedy")), prune=given.get("prune", False),
    )  # fmt: skip


def _file_set(given: Mapping[str, Any]) -> dict[str, Any]:
    return mapping(given.get("set", {}), "set", None)


def _source(what: str) -> dict[str, Any]:
    """What is swept, by its key; a file that holds more, with all of it."""
    path = user_path(what)
    if path.suffix in _FILES and path.is_file():
        values = read_yaml(path)
        if isinstance(values, dict) and "model" in values:
            return {"recipe": what}
        return mapping(values, what, KEYS)
    if path.suffix in _FILES:
        raise UsageError(f"there is no file {shown(what)}")
    from grouprl.lm.run import recipe

    return {"recipe": what} if what in recipe.names() else {"environment": what}

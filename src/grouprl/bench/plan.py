"""A benchmark as a file: methods, what they are tried on, steps and seeds become a list of runs."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from grouprl.bench.cells import ENVIRONMENTS, LANGUAGE, Cell, check_distinct, parse_seeds
from grouprl.bench.values import mapping, named, names, positive, whole
from grouprl.errors import UsageError, shown
from grouprl.importing import load_function, look_in, own_file
from grouprl.reading import read_yaml, with_numbers

FUNCTIONS = ("advantage_function", "surrogate_function")
_FILE = ("about", "methods", "environments", "recipes", "steps", "seeds", "episodes", "points", "point_episodes")
_METHOD = ("preset", "settings", "worker", "subjects", "reward_noise", *FUNCTIONS)
_SUBJECT = {
    ENVIRONMENTS: ("env_id", "env_kwargs", "steps", "seeds", "scale", "reward_size"),
    LANGUAGE: ("recipe", "steps", "seeds", "scale"),
}
_COUNTS = {"episodes": 100, "points": 20, "point_episodes": 20}

Scale = tuple[float, float]
"""The returns that count as 0 and as 1 in a normalised score."""


@dataclass(frozen=True)
class Plan:
    """What a file asks for.

    Attributes:
        name: of the file. about: what it says of itself.
        cells: the runs, seed by seed, so that what is there first covers everything.
        scales: of subjects, where the file has them; language models have 0 to 1.
    """

    name: str
    about: str
    cells: list[Cell]
    scales: dict[str, Scale]

    def only(self, patterns: Collection[str]) -> Plan:
        """The runs whose name, METHOD/SUBJECT/SEED, is like one of the patterns.

        A pattern may end after any part: ``ppo/Hopper-v5`` is all seeds of it, and none of ``ppo/Hopper-v5-wide``.

        Raises UsageError for a pattern that is like none.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            found = {
                c.name
                for c in self.cells
                if f"{c.name}/".startswith(f"{pattern}/")
                or any(fnmatch.fnmatchcase(c.name, p) for p in (pattern, f"{pattern}/*"))
            }
            if not found:
                raise UsageError(
                    f"no run is called {pattern!r}; runs are called METHOD/SUBJECT/SEED, such as "
                    f"{self.cells[0].name}, and * stands for anything"
                )
            chosen |= found
        return replace(self, cells=[cell for cell in self.cells if cell.name in chosen])


def read(path: Path, *, steps: int | None = None, seeds: str | None = None) -> Plan:
    """The plan in a YAML file. ``steps`` and ``seeds`` take the places of all that the file says.

    Raises UsageError for what it must not hold; nothing is made yet (:func:`check` does that).
    """
    values = mapping(read_yaml(path), str(path), _FILE)
    methods = {str(name): mapping(given, f"method {name}", _METHOD) for name, given in named(values, "methods", path)}
    subjects = [
        (str(name), arena, mapping(given, f"{name} in {path}", _SUBJECT[arena]))
        for arena, key in ((ENVIRONMENTS, "environments"), (LANGUAGE, "recipes"))
        for name, given in named(values, key, path)
    ]
    if not methods or not subjects:
        raise UsageError(f"{path} must name methods, and environments or recipes to try them on")
    counts = {name: whole(values.get(name, default), f"{name} in {path}") for name, default in _COUNTS.items()}
    cells, scales = [], {}
    for subject, arena, given in subjects:
        scale = given.get("scale", [0.0, 1.0] if arena == LANGUAGE else None)
        if scale is not None:
            scales[subject] = _scale(scale, subject)
        about = subject_fields(subject, arena, given, None if steps is not None else values.get("steps"))
        about["steps"] = whole(steps if steps is not None else about["steps"], f"steps of {subject}")
        tried = seeds if seeds is not None else given.get("seeds", values.get("seeds", "0-4"))
        for method, options in methods.items():
            if subject in names(options.get("subjects", [subject]), f"subjects of method {method}"):
                cell = _cell(method, options, subject, arena, {**about, **counts}, path.parent)
                cell = replace(cell, reward_noise=_noise(method, options, subject, arena, given))
                cells += [replace(cell, seed=seed) for seed in parse_seeds(tried)]
    _check_subjects(methods, [name for name, _, _ in subjects])
    check_distinct(cells)
    cells.sort(key=lambda cell: cell.seed)
    return Plan(path.stem, str(values.get("about", "")).strip(), cells, scales)


def subject_fields(name: str, arena: str, given: Mapping[str, Any], steps: object) -> dict[str, Any]:
    """Fields of a cell that say what is tried on, and for how many steps."""
    if arena == LANGUAGE:
        from grouprl.lm.run import recipe as recipes

        source = str(given.get("recipe", name))
        return {"recipe": source, "steps": given.get("steps", recipes.load(source).config.get("max_steps"))}
    from grouprl.envs import presets

    preset = presets.load(name) if name in presets.names() else None
    usual = None if preset is None else preset.total_timesteps
    kwargs = given.get("env_kwargs", preset.env_kwargs if preset is not None else {})
    return {
        "env_id": str(given.get("env_id", preset.env_id if preset is not None else name)),
        "env_kwargs": mapping(kwargs, f"env_kwargs of {name}", None),
        "steps": given.get("steps", steps if steps is not None else usual),
    }  # fmt: skip


def _cell(
    method: str, options: Mapping[str, Any], subject: str, arena: str, rest: dict[str, Any], folder: Path
) -> Cell:
    settings = with_numbers(mapping(options.get("settings", {}), f"settings of method {method}", None))
    functions = {name: str(options[name]) for name in FUNCTIONS if options.get(name) is not None}
    worker = tuple(shlex.split(str(options["worker"]))) if options.get("worker") else ()
    if (worker or arena == LANGUAGE) and options.get("preset") not in (None, "auto", "default"):
        what = "has a worker" if worker else f"is tried on the recipe {subject}"
        raise UsageError(
            f"method {method} {what}, and preset={shown(options['preset'])} is for grouprl's own runs on environments; "
            "leave it out"
        )
    preset = preset_of(options.get("preset"), subject) if arena == ENVIRONMENTS and not worker else None
    return Cell(
        method, subject, arena, seed=0, settings=settings, functions=functions, worker=worker,
        preset=preset, ready_made=ready_made(preset, rest.get("recipe")), folder=str(folder.absolute()),
        code=checksum(functions, rest.get("env_id"), folder), **rest,
    )  # fmt: skip


def _noise(method: str, options: Mapping[str, Any], subject: str, arena: str, given: Mapping[str, Any]) -> float:
    """Of a method on a subject: the method's noise, in the size of the subject's reward."""
    sigma = positive(options.get("reward_noise", 0.0), f"reward_noise of method {method}", zero=True)
    if sigma and arena == LANGUAGE:
        raise UsageError(
            f"reward_noise of method {method} is for environments, and {subject} is a language model; name the "
            "method's subjects, or leave it out"
        )
    settings = mapping(options.get("settings", {}), f"settings of method {method}", None)
    if sigma and settings.get("vectorization", "auto") not in ("auto", "sync"):
        raise UsageError(
            f"reward_noise of method {method} with vectorization={settings['vectorization']}: the environments with "
            "noise are made one by one in one process; leave vectorization out"
        )
    return sigma * positive(given.get("reward_size", 1.0), f"reward_size of {subject}")


def preset_of(name: object, subject: str) -> str | None:
    from grouprl.envs import presets

    if name in (None, "default"):
        return None
    if name == "auto":
        return subject if subject in presets.names() else None
    return presets.load(name).name  # type: ignore[arg-type]  # it refuses what is no name


def ready_made(preset: str | None, recipe: object) -> str:
    """A checksum of what a preset or a recipe holds: with other settings under the same name it is another run.

    The code of a recipe's own functions is not in it. Raises UsageError for a preset or a recipe that does not exist.
    """
    if preset is not None:
        from grouprl.envs import presets

        held = presets.load(preset).config
    elif recipe is not None:
        from grouprl.lm.run import recipe as recipes

        text = ("about", "needs", "expect")
        held = {key: value for key, value in recipes.load(str(recipe)).to_dict().items() if key not in text}
    else:
        return ""
    return hashlib.sha256(json.dumps(held, sort_keys=True, default=str).encode()).hexdigest()[:16]


def does(cell: Cell) -> str:
    """What a run does, whatever it is called: equal for a preset and for the settings that it holds.

    A worker is told what its run is called, and may heed it.
    """
    given = asdict(cell)
    if cell.arena == ENVIRONMENTS and not cell.worker:
        from grouprl.envs.config import make_config

        given["settings"] = make_config({**_settings_of(cell.preset), **cell.settings}).model_dump(mode="json")
        for name in ("method", "subject", "preset", "ready_made"):
            del given[name]
    return json.dumps(given, sort_keys=True, default=str)


@cache
def _settings_of(preset: str | None) -> Mapping[str, Any]:
    from grouprl.envs import presets

    return {} if preset is None else presets.load(preset).config


def checksum(functions: Mapping[str, str], env_id: str | None = None, folder: Path | None = None) -> str:
    """Of the user's own files that hold the functions and the environment: with other code it is another run."""
    held = []
    for function in functions.values():
        load_function(function, folder)
        file = getattr(sys.modules[function.partition(":")[0]], "__file__", None)
        held.append(Path(file).read_bytes() if file else b"")
    module, _, _ = (env_id or "").rpartition(":")
    file = own_file(module, folder) if module else None
    held += [Path(file).read_bytes()] if file else []
    return hashlib.sha256(b"".join(held)).hexdigest()[:16] if held else ""


def check(plan: Plan) -> None:
    """Try everything that can be tried before a run begins: settings, environments, recipes.

    Raises UsageError for the first that cannot work, and TrainingError for an environment that takes longer to be made
    than its settings allow.
    """
    for folder in {cell.folder for cell in plan.cells}:
        look_in(folder or None)
    own = {(c.method, c.subject): c for c in plan.cells if not c.worker}
    timeouts: dict[str, float | None] = {}
    for cell in own.values():
        try:
            if "seed" in cell.settings:
                raise UsageError("seed is no setting here; give seeds in the file, or --seeds 0-4")
            if cell.arena == LANGUAGE:
                from grouprl.lm.run import recipe as recipes

                recipes.load(str(cell.recipe)).changed({**cell.settings, **cell.functions})
            else:
                from grouprl.envs import presets
                from grouprl.envs.config import make_config

                preset = {} if cell.preset is None else presets.load(cell.preset).config
                timeouts[cell.subject] = make_config({**preset, **cell.settings}).env_timeout
        except UsageError as error:
            raise UsageError(f"method {cell.method} on {cell.subject}: {error}") from None
    for cell in {c.subject: c for c in own.values() if c.arena == ENVIRONMENTS}.values():
        from grouprl.envs.vector import make_vector
        from grouprl.envs.workers import close_vector

        close_vector(make_vector(str(cell.env_id), 1, "auto", cell.env_kwargs, timeout=timeouts[cell.subject]))


def _check_subjects(methods: Mapping[str, Mapping[str, Any]], subjects: list[str]) -> None:
    tried: set[str] = set()
    for method, options in methods.items():
        own = names(options.get("subjects", subjects), f"subjects of method {method}")
        if not own:
            raise UsageError(f"method {method} has no subjects; name some of {', '.join(subjects)}, or leave them out")
        tried.update(own)
        for name in own:
            if name not in subjects:
                raise UsageError(
                    f"method {method} has the subject {name!r}, which the file does not have: {', '.join(subjects)}"
                )
    if left := [name for name in subjects if name not in tried]:
        raise UsageError(f"no method is tried on {left[0]}; add it to the subjects of one, or leave it out of the file")


def _scale(given: object, subject: str) -> Scale:
    """Two finite numbers that differ; the first is the larger one where less is better."""
    ends = with_numbers(given) if isinstance(given, list) else []
    numbers = [float(end) for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    if len(ends) == len(numbers) == len(set(numbers)) == 2 and all(map(math.isfinite, numbers)):
        return numbers[0], numbers[1]
    raise UsageError(
        f"scale of {subject} is {shown(given)}, and must be two finite numbers that differ, the returns that count as "
        "0 and as 1, such as [-500, -100]"
    )

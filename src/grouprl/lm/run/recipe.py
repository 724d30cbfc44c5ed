"""Recipes: a model, a task and settings in one YAML file. Those that ship are the presets of the language arena."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from importlib import resources
from typing import Any, get_args, get_origin, get_type_hints

from grouprl.errors import UsageError, shown
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.other_libraries import ELSEWHERE
from grouprl.reading import parse_yaml, read_yaml, with_numbers
from grouprl.redaction import with_secrets, without_secrets
from grouprl.runs.files import user_path
from grouprl.settings.names import unknown_setting

_PRESETS = "grouprl.lm.run.presets"


@dataclass(frozen=True)
class Recipe:
    """What a run of ``grouprl train-lm`` is made of.

    Attributes:
        model: hub id, folder, GGUF file, ``smollm2``, or ``tiny`` for a small model with random weights.
        task: a task's name, ``reasoning-gym:NAME``, or a file of JSON lines, which needs ``reward``.
        task_options: options of the task. reward: ``module:function``, instead of the task's own.
        environment: in the place of a task, an environment that is played in text: an id of Gymnasium, a game that
            ships, or ``module:Class``. Its starts are seeds: even ones to train on, odd ones held out.
        environment_options: arguments of :func:`~grouprl.lm.text_environment`; functions as ``module:function``.
        tools: functions that the model may call, each ``module:function``.
        advantage_function, surrogate_function: ``module:function``, in the place of the configuration's ``advantage``
            and of the surrogate of its ``loss_type``; see :mod:`grouprl.objective.user_functions`.
        eval_data: a file of JSON lines to evaluate on, where ``task`` is one; default: its last rows.
        form: prompts as ``messages`` or as bare ``text``.
        n_train, n_eval: rows drawn from the task's two splits; a file is used whole.
        eval_every: optimizer steps between greedy evaluations on the held-out rows; 0: only before and after.
        warm_start: settings of a short supervised start (tiny models only): steps, learning_rate, and an accuracy at
            which it ends.
        lora: settings of peft's LoraConfig, to train an adapter instead of all weights.
        config: settings of :class:`~grouprl.lm.settings.config.GRPOConfig`.
        needs: what to install, if anything. expect: what it reached, and the command that shows it.
    """

    name: str
    model: str
    task: str = ""
    about: str = ""
    task_options: dict[str, Any] = field(default_factory=dict)
    reward: str | None = None
    environment: str | None = None
    environment_options: dict[str, Any] = field(default_factory=dict)
    tools: list[str] = field(default_factory=list)
    advantage_function: str | None = None
    surrogate_function: str | None = None
    eval_data: str | None = None
    form: str = "messages"
    n_train: int = 4096
    n_eval: int = 256
    eval_every: int = 10
    warm_start: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    expect: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kinds in _kinds().items():
            value = getattr(self, name)
            if name == "reward" and isinstance(value, list):
                raise UsageError(
                    f"reward={value} of recipe {self.name} must be one function, module:function; several with weights "
                    "are for GRPOTrainer, or for a function that adds them up"
                )
            if not isinstance(value, kinds) or isinstance(value, bool):
                allowed = " or ".join(dict.fromkeys(_SAID[kind] for kind in kinds))
                raise UsageError(f"{name}={shown(value)} of recipe {self.name} must be {allowed}")
            if isinstance(value, dict) and (wrong := [key for key in value if not isinstance(key, str)]):
                raise UsageError(f"{name} of recipe {self.name} has the key {shown(wrong[0])}; names are text")
        if bool(self.task) == (self.environment is not None):
            raise UsageError(f"recipe {self.name} must name a task or an environment, one of the two")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least or (isinstance(value, float) and not value.is_integer()):
                raise UsageError(f"{name}={value!r} of recipe {self.name} must be a whole number, at least {least}")
            object.__setattr__(self, name, int(value))  # 1e3 is read as a float

    @property
    def subject(self) -> str:
        """What is trained on, for people: the task, or the environment."""
        return self.task or str(self.environment)

    def changed(self, assignments: Mapping[str, Any]) -> Recipe:
        """With some fields, or settings of the configuration, replaced.

        Raises UsageError for a name that is neither, with the closest that is.
        """
        own = settable()
        values = {name: value for name, value in assignments.items() if name in own}
        config = {**self.config, **{name: value for name, value in assignments.items() if name not in own}}
        for name in assignments:
            whole, dot, part = name.partition(".")
            if dot and whole in own:
                raise UsageError(f"unknown setting {name!r}; give the whole of it: --set '{whole}={{{part}: ...}}'")
            if name in _DESCRIBING:
                raise UsageError(f"{name} describes a recipe and cannot be set; write a recipe file of your own")
        for name in config:
            if name not in GRPOConfig.model_fields and name in assignments and name not in _accepted():
                known = [*own, *GRPOConfig.model_fields]
                raise UsageError(unknown_setting(name, known, lambda: "grouprl settings --lm lists them", ELSEWHERE))
        return Recipe(**{**self.__dict__, **values, "config": config})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe file holds them, without secrets."""
        defaults = {f.name: f.default for f in fields(self)}
        values = {
            key: value
            for key, value in self.__dict__.items()
            if value not in (None, "", []) and (value != {} or defaults[key] is None)
        }
        return dict(without_secrets(values))

    def with_secrets(self) -> Recipe:
        """With the secrets that config.yaml of its run does not hold. Raises UsageError for one that is nowhere."""
        try:
            values = {name: with_secrets(getattr(self, name), name) for name in ("model", "task_options", "lora")}
        except ValueError as error:
            raise UsageError(str(error)) from None
        return replace(self, **values)


_SAID = {str: "text", dict: "a mapping", list: "a list", int: "a number", float: "a number", type(None): "left out"}
_LEAST = {"n_train": 1, "n_eval": 1, "eval_every": 0}
_DESCRIBING = ("name", "about", "needs", "expect", "config")


@cache
def _kinds() -> dict[str, tuple[type, ...]]:
    """Types of each field's values, by the field's annotation; a whole number may be written as 1e3, a float."""
    kinds: dict[str, tuple[type, ...]] = {}
    for name, annotation in get_type_hints(Recipe).items():
        origin = get_origin(annotation)
        options = (annotation,) if origin in (None, dict, list) else get_args(annotation)
        plain = tuple(get_origin(option) or option for option in options)
        kinds[name] = (int, float) if plain == (int,) else plain
    return kinds


def settable() -> dict[str, Any]:
    """The fields that ``--set`` changes beside settings of the configuration, with their defaults.

    Those without a default, which every recipe gives, have "of the recipe" in its place.
    """
    defaults: dict[str, Any] = {}
    for item in fields(Recipe):
        if item.name not in _DESCRIBING:
            default = item.default_factory() if callable(item.default_factory) else item.default
            defaults[item.name] = "of the recipe" if default is MISSING else default
    return defaults


def _accepted() -> set[str]:
    from grouprl.lm.settings.trl import FOREIGN, RENAMED

    return {*FOREIGN, *RENAMED}


def names() -> list[str]:
    """The presets, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in resources.files(_PRESETS).iterdir() if f.name.endswith(".yaml"))


def load(source: str | os.PathLike[str]) -> Recipe:
    """A preset by name, or a recipe file: a YAML of one's own, or the config.yaml of a run.

    Raises UsageError if there is none, or it is no recipe.
    """
    text = os.fspath(source)
    if text in names():
        shipped = resources.files(_PRESETS).joinpath(f"{text}.yaml").read_text(encoding="utf-8")
        return _recipe(parse_yaml(shipped, text), text, text)
    path = user_path(text)
    if path.is_dir():
        path = path / "config.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(text, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"no preset and no file {text!r}; {hint}the presets are {', '.join(names())}")
    return _recipe(read_yaml(path), str(path), path.stem)


def _recipe(values: Any, where: str, name: str) -> Recipe:
    if isinstance(values, dict) and "recipe" in values:  # the config.yaml of a run
        values = values["recipe"]
    if not isinstance(values, dict):
        raise UsageError(f"{where} must hold a mapping with model and task, got {type(values).__name__}")
    known = {f.name for f in fields(Recipe)}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}."
            raise UsageError(f"{where}: unknown key {key!r}; {hint} Settings of GRPOConfig belong under config.")
    if "model" not in values or not {"task", "environment"} & set(values):
        lacking = [] if "model" in values else ["model"]
        lacking += [] if {"task", "environment"} & set(values) else ["task"]
        raise UsageError(f"{where} lacks {' and '.join(lacking)}")
    return Recipe(**{"name": name, **with_numbers(values)})

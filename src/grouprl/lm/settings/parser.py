"""TrlParser, as scripts written for TRL use it: arguments of the command line, and a YAML file by ``--config``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import HfArgumentParser

from grouprl.errors import UsageError, refuse, shown
from grouprl.lm.settings.other_libraries import ELSEWHERE
from grouprl.reading import read_yaml, with_numbers
from grouprl.settings.names import unknown_setting


class TrlParser(HfArgumentParser):
    """transformers' HfArgumentParser with ``--config FILE``, whose values take the place of defaults.

    Args:
        dataclass_types: one or several dataclasses; ``grouprl.lm.GRPOConfig`` is one in this respect.
        **options: those of ``argparse.ArgumentParser``.

    Raises UsageError if one has a field ``config``.
    """

    def __init__(self, dataclass_types: Any = None, **options: Any) -> None:
        several = isinstance(dataclass_types, Iterable) and not isinstance(dataclass_types, type)
        kinds = [] if dataclass_types is None else list(dataclass_types) if several else [dataclass_types]
        for kind in kinds:
            if "config" in kind.__dataclass_fields__:
                raise UsageError(f"{kind.__name__} has a field 'config', which is the file's option; rename it")
        super().__init__(kinds, **options)

    def parse_args_and_config(
        self, args: Iterable[str] | None = None, return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True, separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        """An object of each dataclass, from the command line and from the file that ``--config`` names.

        The command line wins. What the file has under ``env`` becomes environment variables.

        Args:
            args: the words of the command line; default: the script's.
            return_remaining_strings: return what no dataclass has a field for, as further words, and in two lists
                with ``separate_remaining_strings``: the file's and the command line's.
            fail_with_unknown_args: raise for what the file has beyond the fields.

        Raises UsageError if the file cannot be read, for values that are not allowed, and for unknown names.
        """
        words = list(sys.argv[1:] if args is None else args)
        unknown = self.set_defaults_with_config(**_file(words))
        *found, rest = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if separate_remaining_strings and return_remaining_strings:
            return *found, unknown, rest
        if return_remaining_strings:
            return *found, unknown + rest
        strange = (unknown[::2] if fail_with_unknown_args else []) + [word for word in rest if word.startswith("--")]
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        names = list(dict.fromkeys(word.lstrip("-").partition("=")[0] for word in strange))
        refuse([unknown_setting(name, known, lambda: "--help lists the settings", ELSEWHERE) for name in names])
        if rest:
            raise UsageError(f"the command line has {shown(rest)}, which belongs to no option")
        return tuple(found)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Let ``values`` take the place of defaults. Returns what there is no option for, as words."""
        unknown: list[str] = []
        for name, value in values.items():
            action = self._option_string_actions.get(f"--{name}")
            if action is None or isinstance(action, argparse._HelpAction):
                unknown += [f"--{name}", str(value)]
            elif action.dest != name and action.dest in values:
                continue  # the new name says it
            else:
                for each in self._actions:  # --no_NAME has the same place
                    if each.dest == action.dest:
                        each.default, each.required = value, False
        return unknown


def _file(words: list[str]) -> dict[str, Any]:
    """What the file says that ``--config`` names among the words, which is taken out of them."""
    at = next((i for i, word in enumerate(words) if word == "--config" or word.startswith("--config=")), None)
    if at is None:
        return {}
    option = words.pop(at)
    if "=" not in option and at == len(words):
        raise UsageError("--config names no file; give --config FILE.yaml")
    path = option.partition("=")[2] if "=" in option else words.pop(at)
    values = with_numbers(read_yaml(path))
    if not isinstance(values, Mapping):
        raise UsageError(f"{path} holds {shown(values)}; it must hold settings, as name: value")
    variables = values.get("env")
    if not isinstance(variables, Mapping | None):
        raise UsageError(f"{path}: env={shown(variables)} must hold environment variables, as NAME: value")
    for name, value in (variables or {}).items():
        os.environ[str(name)] = str(value)
    return {str(name): value for name, value in values.items() if name != "env"}

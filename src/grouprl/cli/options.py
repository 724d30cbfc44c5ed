"""Options that no command has: what a person types who expects a setting to be one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from grouprl.cli.setting_rows import of_environments, of_language_models
from grouprl.errors import UsageError

# Typer brings its own copy of Click since 0.16; the exception is the one beside those that Typer exports.
NoSuchOption: type[Exception] = sys.modules[typer.BadParameter.__module__].NoSuchOption

_OTHER_OPTIONS = {
    **dict.fromkeys(
        ("env_id", "gym_id", "env_name", "environment"), "the environment comes first: grouprl {command} ENV"
    ),
    **dict.fromkeys(("total_timesteps", "total_steps", "timesteps", "num_steps"), "--steps says how long"),
    **dict.fromkeys(("output", "output_dir", "log_dir", "logdir", "save_path", "folder"), "--out names the run folder"),
    **dict.fromkeys(("wandb", "use_wandb", "report_to", "tensorboard"), "--track says where metrics go"),
    **dict.fromkeys(("algo", "algorithm"), "there is one algorithm; its advantage and loss_type are settings: --set"),
}
"""What other command lines have, and what it is called here."""


class Commands(TyperGroup):
    """The commands of grouprl: an unknown option that is the name of a setting is answered with ``--set``."""

    def invoke(self, ctx: Any) -> Any:
        """Parses and runs a command. Raises UsageError where an option is a setting, or has another name here."""
        try:
            return super().invoke(ctx)
        except NoSuchOption as error:
            options = [option for parameter in error.ctx.command.params for option in parameter.opts]  # type: ignore[attr-defined]
            if "--set" in options and (said := _said_of(error.option_name, error.ctx.info_name, options)):  # type: ignore[attr-defined]
                raise UsageError(said) from None
            raise


def _said_of(option: str, command: str, options: Sequence[str]) -> str | None:
    """What to say of an option that a command with settings does not have; None if it is like nothing known.

    Args:
        options: those that the command has, of which alone the answer may speak.
    """
    from grouprl.envs.stable_baselines import EVERYWHERE
    from grouprl.lm.settings.other_libraries import ELSEWHERE
    from grouprl.settings.names import ALIASES

    name = option.lstrip("-").replace("-", "_")
    other = _OTHER_OPTIONS.get(name)
    if other is not None and (not other.startswith("--") or other.split()[0] in options):
        takes_environments = "train" if command == "train-lm" else command
        return f"there is no option {option}; {other.format(command=takes_environments)}"
    # A sweep is of either arena.
    listed = [
        *(of_environments() if command != "train-lm" else ()),
        *(of_language_models() if command != "train" else ()),
    ]
    elsewhere = {**(ELSEWHERE if command != "train" else {}), **(EVERYWHERE if command != "train-lm" else {})}
    known = {setting for _, rows in listed for setting, *_ in rows}
    setting = ALIASES.get(name, name)
    if setting in known:
        return f"there is no option {option}; a setting is given as --set {setting}=VALUE"
    advice = elsewhere.get(name)
    return advice and f"there is no option {option}; settings are given by --set: {advice}"

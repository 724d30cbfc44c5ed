"""The lists of presets and settings."""

from __future__ import annotations

import difflib
import shutil
from typing import Annotated, Any

import typer

from grouprl.cli.common import app
from grouprl.cli.setting_rows import of_environments, of_language_models
from grouprl.errors import UsageError


@app.command("presets")
def presets_command(
    name: Annotated[str | None, typer.Argument(help="Show one preset in full.")] = None,
) -> None:
    """List the presets with what to expect of each, or show one."""
    import yaml

    from grouprl.envs import presets
    from grouprl.lm.run import recipe

    if name is not None:
        close = difflib.get_close_matches(name, recipe.names(), n=1)
        if close and name not in (*recipe.names(), *presets.names()):
            raise UsageError(f"no preset {name!r}; did you mean {close[0]}?")
        shown = recipe.load(name).to_dict() if name in recipe.names() else presets.load(name).__dict__
        print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip())
        return
    print(f"{'grouprl train':28s} {'environment':28s} {'steps':>10s}  expect (mean greedy return)")
    for known in presets.names():
        preset = presets.load(known)
        print(
            f"{known:28s} {preset.env_id:28s} {preset.total_timesteps:>10,d}  {preset.expect.get('mean_return', '-')}"
        )
    print(f"\n{'grouprl train-lm':28s} {'task, model':28s} {'steps':>10s}  expect (greedy, held out)")
    for known in recipe.names():
        made = recipe.load(known)
        what = f"{made.subject}, {made.model}"
        print(f"{known:28s} {what:28s} {made.config['max_steps']:>10,d}  {made.expect.get('accuracy_after', '-')}")


@app.command()
def settings(
    name: Annotated[str | None, typer.Argument(help="Show this setting alone.")] = None,
    lm: Annotated[bool, typer.Option("--lm", help="Those of train-lm.")] = False,
) -> None:
    """List every setting of --set with its default, or show one."""
    listed = list(of_language_models() if lm else of_environments())
    if name is None:
        for heading, rows in listed:
            print(f"{heading}\n")
            for row in rows:
                print(_shown(*row))
            print()
        return
    from grouprl.settings.names import ALIASES

    found = [row for _, rows in listed for row in rows if row[0] == ALIASES.get(name, name)]
    if not found:
        raise _unknown(name, [row[0] for _, rows in listed for row in rows], lm)
    print(_shown(*found[0]))


def _shown(name: str, default: Any, meaning: str) -> str:
    """One setting: name and default on a line, what it means under it, no line wider than the terminal."""
    import textwrap

    width = max(40, min(shutil.get_terminal_size().columns, 120))
    wrapped = textwrap.fill(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return f"  {name} = {default}" + (f"\n{wrapped}" if meaning else "")


def _unknown(name: str, known: list[str], lm: bool) -> UsageError:
    from grouprl.envs.stable_baselines import EVERYWHERE
    from grouprl.lm.settings.other_libraries import ELSEWHERE
    from grouprl.settings.names import unknown_setting

    others = of_environments() if lm else of_language_models()
    if any(row[0] == name for _, rows in others for row in rows):
        arena, option = ("environments", "") if lm else ("language models", " --lm")
        return UsageError(f"{name!r} is a setting of {arena} alone: grouprl settings{option} {name}")
    option = " --lm" if lm else ""
    return UsageError(
        unknown_setting(name, known, lambda: f"grouprl settings{option} lists them", ELSEWHERE if lm else EVERYWHERE)
    )

"""What every command shares: the application, its errors, and how values are read."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from grouprl.cli.options import Commands
from grouprl.errors import GrouprlError, UsageError, first_line, shown
from grouprl.extras import explain_missing
from grouprl.machine.ranks import launched
from grouprl.printing import lasting_streams, show
from grouprl.reading import parse_yaml, with_numbers
from grouprl.runs.signals import leaving_on_signals

app = typer.Typer(
    name="grouprl",
    cls=Commands,
    help="Reinforcement learning without a critic: GRPO for Gymnasium environments and for language models.\n\n"
    "Start with:  grouprl train CartPole-v1   or   grouprl train-lm tiny",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"grouprl {version('grouprl')}")
        raise typer.Exit


@app.callback()
def options(
    asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command."""


def count(text: str) -> int:
    """A whole number, also as 1e6."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value.is_integer():
        raise typer.BadParameter(f"{text!r} is not a whole number such as 100000 or 1e6")
    return int(value)


def main() -> None:
    """Entry point: one clear line for an error of the user's or the environment's, a traceback only for ours."""
    with lasting_streams() as problem, leaving_on_signals() as stopped, _only_the_first_prints():
        status = _status(stopped)
        if reason := problem():
            print(f"error: standard output could not be written: {reason}", file=sys.stderr)
            status = status or 1
    if status and _is_held_up():
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)


@contextmanager
def _only_the_first_prints() -> Iterator[None]:
    """Of several processes that a launcher started, the first alone says what all would say; errors are everyone's."""
    try:
        rank = launched().rank
    except UsageError:  # whatever trains will say so
        rank = 0
    if not rank:
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _is_held_up() -> bool:
    """Whether threads of a call that was given up go on, for which the process would wait when it ends."""
    limits = sys.modules.get("grouprl.runs.time_limit")
    here = (threading.main_thread(), threading.current_thread())
    others = [t for t in threading.enumerate() if not t.daemon and t not in here]
    return bool(others) and limits is not None and limits.gave_up


def _status(stopped: Callable[[], bool]) -> int | str | None:
    """Run the command; what it exits with."""
    try:
        _run(stopped)
    except SystemExit as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    except GrouprlError as error:
        if os.environ.get("GROUPRL_TRACEBACK"):
            raise
        show(f"error: {error}", sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except ModuleNotFoundError as error:
        explained = explain_missing(error)
        if explained is None or os.environ.get("GROUPRL_TRACEBACK"):
            raise
        show(f"error: {explained}", sys.stderr)
        return 2
    except ImportError as error:  # a library that cannot be loaded, such as where memory is limited
        if (error.name or "").startswith("grouprl") or os.environ.get("GROUPRL_TRACEBACK"):
            raise
        show(f"error: a package cannot be loaded: {first_line(error)}", sys.stderr)
        return 1
    except MemoryError:
        if os.environ.get("GROUPRL_TRACEBACK"):
            raise
        print("error: there is not enough memory; train on fewer or shorter samples at once", file=sys.stderr)
        return 1
    except OSError as error:  # a name that is too long, a folder without permission, ...
        if error.filename is None or os.environ.get("GROUPRL_TRACEBACK"):
            raise
        show(f"error: cannot use {shown(str(error.filename))}: {error.strerror}", sys.stderr)
        return 2
    return 0


def _run(stopped: Callable[[], bool]) -> None:
    """Run the command. After a signal an error says nothing: it may be what a library made of an import that ended."""
    try:
        app()
    except Exception:
        if stopped():
            raise KeyboardInterrupt from None
        raise


def assigned(pairs: list[str] | None) -> dict[str, Any]:
    """``["a=1", "b=[2, 3]"]`` as a mapping; values are read as YAML."""
    values: dict[str, Any] = {}
    for pair in pairs or []:
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise UsageError(f"cannot read {pair!r}; write KEY=VALUE, such as learning_rate=1e-3")
        try:
            value = parse_yaml(text, "the value")
        except UsageError as error:
            said = f"cannot read {shown(pair)}: {error}; quote it as YAML, such as \"{shown(key)[1:-1]}='text'\""
            raise UsageError(said) from None
        values[key.strip()] = with_numbers(value)
    return values


def command(name: str) -> str:
    """How to call a program of this installation from here: by name, or by path where it is not on the PATH."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not own.exists() or (found is not None and Path(found).resolve() == own.resolve()):
        return name
    return os.path.relpath(own)

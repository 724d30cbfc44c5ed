"""What people write themselves, by name: `module:function` for rewards and estimators, `module:Env` for environments.

Modules in the current directory are found, as they are by a script that lies there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from grouprl.errors import UsageError


def import_here(name: str, folder: str | os.PathLike[str] | None = None) -> ModuleType:
    """Import a module that is installed, or lies in the current directory or ``folder``.

    Both folders go to the end of the search path, where they cannot hide an installed package. What the import raises
    is passed on.
    """
    look_in(folder)
    return importlib.import_module(name)


def look_in(folder: str | os.PathLike[str] | None) -> None:
    """From now on modules in the current directory and in ``folder`` are found, wherever they are asked for."""
    for place in _places(folder):
        if str(place) not in sys.path:
            sys.path.append(str(place))
    importlib.invalidate_caches()


def own_file(module: str, folder: str | os.PathLike[str] | None = None) -> Path | None:
    """The file of a module of the user's own, found without importing it.

    None if there is no such module, or it belongs to grouprl, to Python or to an installed package.
    """
    look_in(folder)
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if found is None or not found.has_location or found.origin is None:
        return None
    file = Path(found.origin).resolve()
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return None if installed.union(_OURS).intersection(file.parents) else file


_PACKAGE = Path(__file__).resolve().parent
_OURS = {_PACKAGE, _PACKAGE.parents[1] / "benchmarks"}
"""This library, and the benchmarks in its repository: the commit says which code of theirs it was."""


def _places(folder: str | os.PathLike[str] | None) -> list[Path]:
    """The current directory, and ``folder`` where that is another one."""
    return list(dict.fromkeys((Path.cwd().resolve(), *([] if folder is None else [Path(folder).resolve()]))))


def load_function(name: str, folder: str | os.PathLike[str] | None = None) -> Callable[..., Any]:
    """The function called `module:function`, e.g. a reward. Modules in the current directory and `folder` are found.

    Raises UsageError if the name has another form, or there is no such module or function; what the module itself
    raises when it is imported is passed on.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UsageError(f"a function is given as module:function, such as my_rewards:correct; got {name!r}.")
    try:
        module = import_here(module_name, folder)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something it imports is not
        raise UsageError(
            f"there is no module {error.name!r}; it is looked for in {', in '.join(map(str, _places(folder)))} and "
            "among the installed packages."
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(
            f"module {module_name!r} ({getattr(module, '__file__', None) or 'built in'}) has no {attribute!r}; "
            f"it has: {', '.join(public[:20]) or 'no function'}."
        )
    if not callable(function):
        raise UsageError(f"{name} is a {type(function).__name__}, not a function.")
    named: Callable[..., Any] = function
    return named

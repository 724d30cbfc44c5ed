"""A run that replaces another one in the same folder, until it is of use or has failed.

The new run is made in the place of the older one, whose files wait in ``.replaced``. Whatever happens in between, one
look says what to do: config.yaml goes there first and comes back last, so without one in the folder itself what is
there belongs to the older run.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from grouprl.runs.files import explain_os_error, free_path
from grouprl.runs.layout import RunLayout


def _aside(run: RunLayout) -> Path:
    return run.path / ".replaced"


def is_replacing(run: RunLayout) -> bool:
    """Whether the files of an older run wait in the folder."""
    return _aside(run).is_dir()


def older_config(run: RunLayout) -> Path:
    """The config.yaml of the older run, while its files wait."""
    return _aside(run) / run.config_path.name


def put_aside(run: RunLayout) -> None:
    """Put the run that is there aside, for a new one in its place. Raises OSError if a file cannot be moved."""
    if is_replacing(run):  # of a run that was killed
        abandon(run)
    _aside(run).mkdir(exist_ok=True)
    try:
        for path in reversed(run.made()):
            os.replace(path, _aside(run) / path.name)
    except OSError:
        _bring_back(run)
        raise


def settle(run: RunLayout) -> None:
    """Delete the older run, if there is one."""
    if is_replacing(run):
        older_config(run).unlink(missing_ok=True)
        shutil.rmtree(_aside(run), ignore_errors=True)


def abandon(run: RunLayout) -> Path | None:
    """Keep what is of use, and bring back the older run, as :meth:`grouprl.runs.RunFolder.abandon` says."""
    try:
        if run.is_usable():
            settle(run)
            return run.path
        if not run.config_path.is_file() or not run.has_steps():
            if run.config_path.is_file():
                for path in run.made():
                    _delete(path)
            _bring_back(run)
            return None
        if not is_replacing(run):
            return run.path
        beside = free_path(run.path.with_name(f"{run.path.name}-failed"))
        beside.mkdir()
        for path in run.made():
            os.replace(path, beside / path.name)
        _bring_back(run)
    except OSError as error:
        raise explain_os_error(error, run.path) from error
    return beside


def _bring_back(run: RunLayout) -> None:
    """Put the files of an older run in their places, and delete the folder if nothing is in it then."""
    if is_replacing(run):
        for path in sorted(_aside(run).iterdir(), key=lambda path: path.name == run.config_path.name):
            os.replace(path, run.path / path.name)
        _aside(run).rmdir()
    if not run.holds_something():
        with suppress(OSError):  # whoever holds the folder deletes it
            run.path.rmdir()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

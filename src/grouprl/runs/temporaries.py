"""What is written beside its place: its name says which process writes it, so that what a dead one left can go."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from grouprl.errors import UsageError

_NAME = re.compile(r"\.(.+)\.(\d+)-([0-9a-f]{8})-\d+\.(tmp|old)(\.[^.]*)?")
_SESSION = secrets.token_hex(4)
"""Tells this process from a dead one of the same number: in a container each process may be number 1."""
_count = itertools.count()


def beside(target: Path, kind: str = "tmp", suffix: str = "") -> Path:
    """A new path beside `target`: for what will replace it ("tmp"), or for what it replaces ("old").

    `suffix` is the end of the target's name, where that of the new path must be the same.

    Raises UsageError if `target` has no name, as the current folder and the root have none.
    """
    if target.name in ("", ".."):
        raise UsageError(f"{target} is a folder that is there already; give the name of what is to be written in it")
    stem = target.name.removesuffix(suffix)
    return target.with_name(f".{stem}.{os.getpid()}-{_SESSION}-{next(_count)}.{kind}{suffix}")


def is_left_over(path: Path) -> bool:
    """Whether a process that has ended left `path` in the middle of writing."""
    match = _NAME.fullmatch(path.name)
    return match is not None and not _writes(int(match[2]), match[3])


def remove_left_over(folder: Path, target: str | None = None) -> None:
    """Delete what processes that have ended left in `folder` in the middle of writing, `target` or anything.

    A folder that was about to be replaced goes back to its place if the new one is not there. Nothing is raised: what
    cannot be deleted stays.
    """
    with suppress(OSError):
        for path in [folder / name for name in os.listdir(folder) if name.startswith(".")]:
            match = _NAME.fullmatch(path.name)
            if match is None or not is_left_over(path):
                continue
            name = match[1] + (match[5] or "")
            if target is not None and target != name:
                continue
            if match[4] == "old" and not os.path.lexists(folder / name):
                os.replace(path, folder / name)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _writes(process: int, session: str) -> bool:
    if process == os.getpid():
        return session == _SESSION
    if os.name == "nt":
        return True  # there, asking whether a process lives could end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it lives, and is somebody else's
        return True
    return True

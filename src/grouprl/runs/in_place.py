"""Folders that must stay where they are while this process writes in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grouprl.errors import TrainingError

_kept: dict[Path, os.stat_result] = {}


@contextmanager
def kept_in_place(folder: Path) -> Iterator[None]:
    """Within, writing in `folder` is refused once it is not there any more, or another one is in its place."""
    place = folder.absolute()
    _kept[place] = os.stat(place)
    try:
        yield
    finally:
        _kept.pop(place, None)


def check_in_place(path: Path) -> None:
    """Raise TrainingError if `path` is in a folder that was deleted, moved or replaced since it is written in.

    Otherwise it would be made anew, and hold the rest of a run without its beginning.
    """
    for folder, before in list(_kept.items()):
        if not path.absolute().is_relative_to(folder):
            continue
        try:
            found = os.path.samestat(os.stat(folder), before)
        except (FileNotFoundError, NotADirectoryError):
            found = False
        except OSError:  # writing will say what is wrong
            continue
        if not found:
            raise TrainingError(
                f"Cannot write {path}: the folder {folder} was deleted, moved or replaced by another since this run "
                "began. If it was moved, go on with it where it is now; otherwise start anew."
            )


def _forget_in_child() -> None:
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)

"""One process at a time writes a run folder.

The lock is the operating system's (`flock`) on a file in the folder: it frees itself when the process ends, however it
ends, and holds between machines on network disks that pass it on. Reading a run needs no lock. Whoever takes the lock
removes what others that were killed have left half written.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grouprl.errors import UsageError
from grouprl.runs.files import explain_os_error
from grouprl.runs.in_place import kept_in_place
from grouprl.runs.temporaries import remove_left_over

with suppress(ImportError):  # without Unix, nothing keeps two processes from one folder
    import fcntl

LOCK = ".lock"
"""The name of the file in a run folder that is locked while a process writes there."""

_log = logging.getLogger("grouprl")
_held: dict[Path, tuple[int, int]] = {}
"""Folders that this process holds: the open file, and the thread that holds it."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is missing, so that no other process or thread writes there.

    What runs within may lock the same folder again. On a disk that knows no locks, this is said and nothing is locked.

    Raises UsageError if another process or thread holds it, which is named, or if the folder cannot be written.
    """
    place = Path(os.path.realpath(folder))
    held = _held.get(place)
    if held is not None and held[1] == threading.get_ident():
        yield
        return
    if held is not None:
        raise UsageError(f"{folder} is in use by another thread of this process. Give each run a folder of its own.")
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = _take(place / LOCK, folder)
    except OSError as error:
        raise explain_os_error(error, place / LOCK if place.is_dir() else folder) from error
    if descriptor is None:
        with kept_in_place(folder):
            yield
        return
    _held[place] = (descriptor, threading.get_ident())
    try:
        for inner in (place, place / "checkpoints"):
            remove_left_over(inner)
        with kept_in_place(folder):
            yield
    finally:
        with suppress(OSError):  # removed while it is held: whoever opened it meanwhile sees that it is gone
            (place / LOCK).unlink()
        if _held.pop(place, None) is not None:
            os.close(descriptor)


def _take(path: Path, folder: Path) -> int | None:
    """An open file at `path` with the lock on it, or None on a disk without locks."""
    if "fcntl" not in globals():
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UsageError(f"{folder} is in use by {holder}. Wait until it has ended, or end it first.") from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            _log.warning("the disk of %s knows no locks: see to it that no second process writes there", folder)
            return None
        if _same_file(descriptor, path):
            _say_who_holds(descriptor)
            return descriptor
        os.close(descriptor)  # the one who held it removed it in between


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _say_who_holds(descriptor: int) -> None:
    """Write down who holds the lock, for the message of whoever is refused it."""
    about = {
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):  # a full disk keeps no lock from holding
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {about['process']} on {about['machine']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _forget_in_child() -> None:
    """A forked child does not hold its parent's folders: an orphaned worker must not keep one locked."""
    for descriptor, _ in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)

"""Folders of several files, whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grouprl.errors import GrouprlError, TrainingError
from grouprl.runs.files import explain_os_error
from grouprl.runs.in_place import check_in_place
from grouprl.runs.temporaries import beside, remove_left_over


@contextmanager
def atomic_folder(path: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an empty folder beside `path`; move it to `path` on success, remove it on failure.

    Args:
        path: where the folder shall be. What is there is replaced.
        check: raises UsageError if what is at `path` must stay.

    Raises:
        UsageError: as `check`, or the path cannot be written.
        TrainingError: the disk is full or broken.
    """
    target = path.absolute()
    check_in_place(target)
    remove_left_over(target.parent, target.name)
    check(path)
    temporary, old = beside(target), beside(target, "old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # some writers make files that only their owner can read
        for file in [*temporary.rglob("*"), temporary]:
            if file.is_file():
                file.chmod(mode)
            flush(file)
        if target.exists():
            os.replace(target, old)  # a folder cannot be replaced in one step unless it is empty
        os.replace(temporary, target)
        flush(target.parent)
    except OSError as error:
        raise explain_os_error(error, path) from error
    except GrouprlError:
        raise
    except Exception as error:
        if "(os error " not in str(error):  # how safetensors and tokenizers, written in Rust, pass on a full disk
            raise
        reason = str(error).rstrip(".")
        raise TrainingError(f"Cannot write {path}: {reason}. Free some space, or write to another disk.") from error
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until what was written to a file or folder is on the disk, where the system can do that."""
    with suppress(OSError):  # Windows cannot open folders, and some network disks cannot flush
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Files that are either whole or absent.

Everything a run leaves behind is written to a temporary file in the same folder, flushed to the disk and then moved
over its destination in one step: a crash, a full disk or Ctrl-C leaves the previous version untouched.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from grouprl.errors import DamagedFileError, GrouprlError, TrainingError, UsageError, shown
from grouprl.runs.in_place import check_in_place
from grouprl.runs.temporaries import beside, remove_left_over

_log = logging.getLogger("grouprl")

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gives, with ``~`` as their home folder: the gate of every file and folder that is named.

    Raises UsageError for what is no path, or one that no file system holds.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise UsageError(f"{shown(path)} is no path; give text or a pathlib.Path")
    try:
        parts = os.fsencode(text).split(os.fsencode(os.sep))
    except UnicodeEncodeError:
        parts = [b"\0"]
    if any(b"\0" in part or len(part) > 255 for part in parts):
        raise UsageError(
            f"{shown(text)} cannot be a path: it holds a character that no path has, or a name of more than 255 bytes"
        )
    return Path(os.path.expanduser(text))


def explain_os_error(error: OSError, path: Path) -> GrouprlError:
    """The error of ours that says what kept `path` from being written: TrainingError for the disk, else UsageError."""
    reason = error.strerror or str(error)
    if error.errno in _DISK_ERRORS:
        return TrainingError(f"Cannot write {path}: {reason}. Free some space or choose a folder on another disk.")
    return UsageError(f"Cannot write {path}: {reason}. Choose a path that you may write to.")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty temporary file beside `path`, with its suffix; move it over `path` on success.

    The folder is made if it is missing. If the block raises, the temporary file is removed and `path` is as it was.
    What a process that was killed left of `path` is removed too.

    Raises:
        UsageError: the path cannot be written (permission, a folder in the way, ...).
        TrainingError: the disk is full or broken, or the folder of the run is not there any more.
    """
    target = user_path(path)
    check_in_place(target)
    temporary = beside(target, suffix=target.suffix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(target.parent, target.name)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers make files that only their owner can read
        _flush_to_disk(temporary)
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise explain_os_error(error, target) from error
    finally:
        with suppress(OSError):  # after success there is nothing left to remove
            temporary.unlink()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically. Raises as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically as UTF-8, line ends as they are, lone surrogates escaped.

    Raises as `atomic_path` does.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` to `path` atomically as indented JSON.

    JSON has no NaN and no infinity; they become null, so that a run without one complete episode still has a summary
    that every reader accepts. Raises UsageError if `obj` holds something JSON cannot, else as `atomic_path` does.
    """
    try:
        text = json.dumps(_finite(obj), indent=2, allow_nan=False, default=plain_number)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Cannot write {path} as JSON: {error}. Give numbers, strings, lists and mappings.") from error
    write_text(path, text + "\n")


def write_yaml(path: str | os.PathLike[str], obj: Any, *, seal: bool = False) -> None:
    """Write `obj` to `path` atomically as YAML, keys in their own order, plain types only.

    With `seal`, a comment at the end has the checksum of what is before it, for `is_sealed`.

    Raises UsageError if `obj` holds something plain YAML cannot (an object, a Path, ...), else as `atomic_path` does.
    """
    import yaml

    try:
        text = yaml.safe_dump(obj, sort_keys=False, allow_unicode=True, width=120)
    except yaml.YAMLError as error:
        raise UsageError(f"Cannot write {path} as YAML: {error}. Give numbers, strings, lists and mappings.") from error
    write_text(path, text + (f"{_SEAL.decode()}{xxh3_64(text.encode()).hexdigest()}\n" if seal else ""))


_SEAL = b"# xxh3_64 of the lines above: "


def is_sealed(data: bytes) -> bool:
    """Whether a YAML file is as `write_yaml` sealed it; one without a seal is not."""
    text, seal, checksum = data.rpartition(_SEAL)
    return bool(seal) and checksum.strip() == xxh3_64(text).hexdigest().encode()


def check_file(path: Path, kind: str, most_bytes: int | None = None) -> int:
    """The size of a file that can be read: no folder, and nothing that reading would wait for, such as a pipe.

    Raises DamagedFileError, in which `kind` says what file it should be.
    """
    try:
        about = path.stat()
        if stat.S_ISREG(about.st_mode):
            with path.open("rb"):
                pass
    except FileNotFoundError as error:
        what = "a link to nothing" if path.is_symlink() else "not there"
        raise DamagedFileError(f"There is no {kind} {path}: it is {what}.") from error
    except OSError as error:
        raise DamagedFileError(f"Cannot read the {kind} {path}: {error.strerror or error}.") from error
    if not stat.S_ISREG(about.st_mode):
        found = _KINDS.get(stat.S_IFMT(about.st_mode), "a special file")
        raise DamagedFileError(f"{path} is {found}, not a {kind}.")
    if most_bytes is not None and about.st_size > most_bytes:
        raise DamagedFileError(f"{path} is too large for a {kind}: it has {about.st_size:,} bytes.")
    return about.st_size


def list_folder(path: Path) -> list[Path]:
    """What a folder holds, nothing if there is none. Raises DamagedFileError if it cannot be read."""
    try:
        return [path / name for name in os.listdir(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DamagedFileError(f"Cannot read the folder {path}: {error.strerror or error}.") from error


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bytes(path: Path, kind: str, most_bytes: int = 1 << 34) -> bytes:
    """What a file holds. Raises DamagedFileError, in which `kind` says what file it should be, if it cannot be read."""
    check_file(path, kind, most_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedFileError(f"Cannot read the {kind} {path}: {error.strerror or error}.") from error


def file_checksum(path: Path) -> str:
    """xxh3_64 of what a file holds. Raises OSError."""
    checksum, buffer = xxh3_64(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    return str(checksum.hexdigest())


def plain_number(value: Any) -> Any:
    """The Python number inside a NumPy or torch scalar, for `json.dumps(default=...)`; TypeError for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a number, a string, a list or a mapping")


def rounded(value: float, digits: int) -> float | None:
    """`value` to so many significant digits; None for what JSON has no number for."""
    near = float(f"{value:.{digits}g}")
    return near if math.isfinite(near) else None  # the largest numbers round to infinity


def _finite(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(value) for value in obj]
    if not isinstance(obj, (str, bool, int, float)) and obj is not None:
        obj = plain_number(obj)
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # The rename itself must reach the disk too. Windows cannot open folders, and some network disks cannot flush them.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_path(wanted: Path) -> Path:
    """The path, with -2, -3, ... after it if it is taken."""
    path, number = wanted, 2
    while path.exists():
        path = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return path

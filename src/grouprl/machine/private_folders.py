"""Folders that nobody but this process's user and root can change, for files that are run.

Whoever can change a library, or any folder on the way to it, decides what the process runs that loads it. So every
folder on the way is opened in turn, looked at by its descriptor, and never looked up by name again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MOST_LINKS = 40
_CHECKSUM = hashlib.sha256().digest_size
_HOUR = 3600.0
_SCRATCH = "compiling-"
_PER_PROCESS = "grouprl-once-"


class NotPrivateError(Exception):
    """Somebody else can change the folder; the message names it and says why."""


class PrivateFolder:
    """An open folder. Files in it are named, read and written relative to its descriptor.

    Args:
        path: where it is, for messages.
        fd: its descriptor, which the caller closes.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    def __truediv__(self, name: str) -> str:
        """A path of the file that leads through the descriptor, wherever the folder may be moved."""
        return f"/proc/self/fd/{self.fd}/{name}"

    def open(self, name: str) -> int | None:
        """A descriptor of a file that :meth:`write` made; None if there is none, or it is not what was written.

        A file counts only if it is a plain one, belongs to this user or root, nobody else may write to it, and its
        checksum agrees.
        """
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:
            return None
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and _is_ours(info) and not _others_write(info) and _content(fd) is not None:
            return fd
        os.close(fd)
        return None

    def read(self, name: str) -> bytes | None:
        """The content of a file, if :meth:`open` gives it."""
        fd = self.open(name)
        if fd is None:
            return None
        try:
            return _content(fd)
        finally:
            os.close(fd)

    def write(self, name: str, content: bytes) -> None:
        """Write a new file with its checksum behind its content. Raises OSError."""
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=self.fd)
        with os.fdopen(fd, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())

    def take(self, other: PrivateFolder, name: str) -> None:
        """Move the file `name` here from `other`, over whatever has its name. Raises OSError."""
        try:
            os.replace(name, name, src_dir_fd=other.fd, dst_dir_fd=self.fd)
        except OSError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode):
                raise
            shutil.rmtree(self / name)
            os.replace(name, name, src_dir_fd=other.fd, dst_dir_fd=self.fd)

    @contextmanager
    def scratch(self) -> Iterator[PrivateFolder]:
        """A new empty folder within this one, which is removed afterwards. Raises OSError."""
        name = _SCRATCH + secrets.token_hex(8)
        os.mkdir(name, 0o700, dir_fd=self.fd)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                yield PrivateFolder(self.path / name, fd)
            finally:
                os.close(fd)
        finally:
            shutil.rmtree(self / name, ignore_errors=True)

    @contextmanager
    def one_at_a_time(self, patience: float) -> Iterator[None]:
        """Wait until no other process is here, at most `patience` seconds, and remove what a killed one left behind."""
        end = time.monotonic() + patience
        alone = self._lock()
        while not alone and time.monotonic() < end:
            time.sleep(0.05)
            alone = self._lock()
        try:
            _remove_old(self.fd, _SCRATCH, age=0.0 if alone else _HOUR)
            yield
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN) if alone else None

    def _lock(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody has it, or the file system knows no locks
            return False
        return True


def folders_to_keep_in() -> list[Path]:
    """Where compiled code may be kept, best first: the user's cache folder, then a fixed one for temporary files."""
    folders = []
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # the XDG specification: a relative path is to be ignored
        folders.append(Path(cache, "grouprl"))
    else:
        with suppress(RuntimeError):  # nobody knows a home folder
            home = Path.home()
            if home.is_dir() and home.is_absolute() and home != Path("/"):  # a home that is missing is not made here
                folders.append(home / ".cache" / "grouprl")
    with suppress(OSError):  # no folder for temporary files can be written to
        folders.append(Path(tempfile.gettempdir()).absolute() / f"grouprl-{os.geteuid()}")
    return folders


@contextmanager
def private_folder(path: Path, *, make: bool) -> Iterator[PrivateFolder]:
    """Open the folder at `path`.

    It must belong to this process's user or to root, and nobody else may write to it. The same holds for every folder
    on the way, except that folders such as /tmp will do, where nobody can move what belongs to another (the sticky
    bit). Symbolic links on the way must be this user's or root's; the folder itself must not be one.

    Raises:
        NotPrivateError: somebody else could change what is in it.
        OSError: it is not there, or (with `make`) cannot be made.
    """
    fd = _walk(path, make)
    try:
        if os.fstatvfs(fd).f_flag & os.ST_NOEXEC:
            raise NotPrivateError(f"{path} is on a file system that runs nothing (noexec)")
        yield PrivateFolder(path, fd)
    finally:
        os.close(fd)


@contextmanager
def folder_of_this_process() -> Iterator[PrivateFolder]:
    """A new folder among temporary files for this user alone, removed afterwards. Raises OSError.

    It is used by its descriptor alone, so it does not matter who can rename it.
    """
    parent = tempfile.gettempdir()
    with suppress(OSError):
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _remove_old(fd, _PER_PROCESS, age=_HOUR)
        finally:
            os.close(fd)
    path = tempfile.mkdtemp(prefix=_PER_PROCESS)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
                raise OSError(f"{path} was exchanged by somebody else")
            yield PrivateFolder(Path(path), fd)
        finally:
            os.close(fd)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _walk(path: Path, make: bool) -> int:
    """The descriptor of the folder at `path`; each folder on the way is checked once it is open."""
    to_go, links = [*reversed(path.parts[1:])], 0
    here, at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), Path("/")
    try:
        _check_on_the_way(here, at)
        while to_go:
            name = to_go.pop()
            try:
                info = os.stat(name, dir_fd=here, follow_symlinks=False)
            except FileNotFoundError:
                if not make:
                    raise
                with suppress(FileExistsError):  # another process was faster
                    os.mkdir(name, 0o700, dir_fd=here)
                info = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                links += 1
                if not to_go or not _is_ours(info) or links > _MOST_LINKS:
                    raise NotPrivateError(f"{at / name} is a symbolic link")
                target = Path(os.readlink(name, dir_fd=here))
                to_go += reversed(target.parts[target.is_absolute() :])
                if target.is_absolute():
                    os.close(here)
                    here, at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), Path("/")
                continue
            following = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here, at = following, at / name
            _check_on_the_way(here, at)
        if _others_write(os.fstat(here)):
            raise NotPrivateError(f"{at} can be written to by others")
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
    finally:
        os.close(here)


def _check_on_the_way(fd: int, at: Path) -> None:
    info = os.fstat(fd)
    if not _is_ours(info):
        raise NotPrivateError(f"{at} belongs to another user ({info.st_uid})")
    if _others_write(info) and not info.st_mode & stat.S_ISVTX:
        raise NotPrivateError(f"{at} can be written to by others")


def _content(fd: int) -> bytes | None:
    """What is in a file before its checksum, if that agrees and there is anything."""
    try:
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            data = file.read()
    except OSError:
        return None
    content, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    return content if content and hashlib.sha256(content).digest() == checksum else None


def _is_ours(info: os.stat_result) -> bool:
    return info.st_uid in (os.geteuid(), 0)


def _others_write(info: os.stat_result) -> bool:
    return bool(info.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _remove_old(parent: int, prefix: str, age: float) -> None:
    """Remove this user's folders in `parent` that begin with `prefix` and are older than `age` seconds."""
    with suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(prefix):
                info = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if info.st_uid == os.geteuid() and time.time() - info.st_mtime >= age:
                    shutil.rmtree(f"/proc/self/fd/{parent}/{name}", ignore_errors=True)

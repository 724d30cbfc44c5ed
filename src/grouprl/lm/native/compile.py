"""C that is compiled where it runs: for this processor, at first use, by the system's compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_HEADERS = ("vector.h", "products.h", "linear.h", "panels.h")
_SOURCES = ("decode.c", "attention.c", "gradient.c", "head.c", "layer.c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi")


class UnavailableError(RuntimeError):
    """There is no compiled code here; the message says why."""


def library() -> ctypes.CDLL:
    """The compiled functions.

    The file is kept in ``$XDG_CACHE_HOME/grouprl`` (or ``~/.cache/grouprl``) under a name made of the source, the
    compiler and the processor, so that it is compiled once. ``$CC`` names another compiler than ``cc``.

    Raises UnavailableError if there is no compiler, it fails, or the processor refuses.
    """
    found = _find()
    if isinstance(found, str):
        raise UnavailableError(found)
    return found


@cache
def _find() -> ctypes.CDLL | str:
    """The compiled functions, or why there are none: text, as an exception would keep what its frames hold alive."""
    try:
        return _load()
    except UnavailableError as error:
        return str(error)


def _load() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise UnavailableError(f"compiled code is for Linux, this is {sys.platform}")
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise UnavailableError("there is no C compiler (cc, gcc or clang; install gcc, or set CC)")
    import_module("torch")  # its OpenMP is the one the functions use
    for flags in (_FLAGS, (*_FLAGS, "-mno-amx-tile")):
        loaded = _built(shlex.split(found), flags)
        if loaded.grouprl_start() == 0:
            return loaded
    raise UnavailableError("the system does not grant what the processor says it has")


def _built(compiler: list[str], flags: Sequence[str]) -> ctypes.CDLL:
    path = _folder() / f"kernels-{_key(compiler, flags)}.so"
    try:
        if not path.exists():
            _compile(compiler, flags, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path}: {error}") from error


def available() -> bool:
    """Whether :func:`library` gives one."""
    return not isinstance(_find(), str)


def _folder() -> Path:
    """Where compiled files are kept, or a folder of the process's user where that cannot be written to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grouprl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    other = Path(tempfile.gettempdir()) / f"grouprl-{os.getuid()}"
    other.mkdir(mode=0o700, exist_ok=True)
    if other.stat().st_uid != os.getuid():
        raise UnavailableError(f"{other} belongs to somebody else")
    return other


def _key(compiler: list[str], flags: Sequence[str]) -> str:
    """What the result of compiling depends on."""
    digest = hashlib.sha256()
    for name in (*_HEADERS, *_SOURCES):
        digest.update((_HERE / name).read_bytes())
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{shlex.join(compiler)} --version: {error}") from error
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu += "".join(
            line for line in info.read_text().split("\n\n")[0].splitlines() if line.startswith(("flags", "model name"))
        )
    for part in (version, " ".join(flags).encode(), cpu.encode()):
        digest.update(part)
    return digest.hexdigest()[:20]


def _compile(compiler: list[str], flags: Sequence[str], path: Path) -> None:
    """Compile to ``path``. OpenMP's library is not linked: torch has loaded one, and two would fight for the cores."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        for command in (
            [*compiler, *flags, "-c", *(str(_HERE / name) for name in _SOURCES)],
            [*compiler, "-shared", *(name.replace(".c", ".o") for name in _SOURCES), "-o", "kernels.so", "-lm"],
        ):
            try:
                done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False, timeout=120)
            except (OSError, subprocess.SubprocessError) as error:
                raise UnavailableError(f"{shlex.join(compiler)}: {error}") from error
            if done.returncode != 0:
                why = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise UnavailableError(f"{shlex.join(compiler)} failed: {why}")
        (Path(scratch) / "kernels.so").replace(path)

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
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path

SHARED = Path(__file__).resolve().parent
"""Where what both arenas use is."""
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fno-math-errno", "-Wno-psabi")


_NAMES_OF_PROCESSORS = ("flags", "model name", "Features", "CPU implementer", "CPU variant", "CPU part")


class UnavailableError(RuntimeError):
    """There is no compiled code here; the message says why."""


class Kernels:
    """The functions of some C files, compiled once for this processor.

    The result is kept in ``$XDG_CACHE_HOME/grouprl`` (or ``~/.cache/grouprl``) under a name made of the sources, the
    compiler and the processor. ``$CC`` names another compiler than ``cc``.

    Args:
        folder: where the files are.
        sources, headers: their names; ``vector.h`` is there for all of them.
        variants: additional flags to try in turn, until ``accept`` is content.
        accept: looks at what was loaded and says whether it runs here.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[str],
        headers: Sequence[str] = (),
        variants: Sequence[tuple[str, ...]] = ((),),
        accept: Callable[[ctypes.CDLL], bool] = lambda _: True,
    ) -> None:
        self.sources = [folder / name for name in sources]
        self.headers = [SHARED / "vector.h", *(folder / name for name in headers)]
        self.variants, self.accept = variants, accept

    def functions(self) -> ctypes.CDLL:
        """The compiled functions.

        Raises UnavailableError if there is no compiler, it fails, or the processor refuses.
        """
        if isinstance(self._found, str):
            raise UnavailableError(self._found)
        return self._found

    @property
    def available(self) -> bool:
        """Whether :meth:`functions` gives one."""
        return not isinstance(self._found, str)

    @cached_property
    def _found(self) -> ctypes.CDLL | str:
        """The compiled functions, or why there are none, as text: an exception would keep what its frames hold."""
        try:
            return self._load()
        except UnavailableError as error:
            return str(error)

    def _load(self) -> ctypes.CDLL:
        if sys.platform != "linux":
            raise UnavailableError(f"compiled code is for Linux, this is {sys.platform}")
        found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if found is None:
            raise UnavailableError("there is no C compiler (cc, gcc or clang; install gcc, or set CC)")
        import_module("torch")  # its OpenMP is the one the functions use
        try:
            compiler = shlex.split(found)
        except ValueError as error:
            raise UnavailableError(f"CC={found!r} is no command ({error})") from error
        for variant in self.variants:
            loaded = self._built(compiler, (*_FLAGS, *variant))
            if self.accept(loaded):
                return loaded
        raise UnavailableError("the system does not grant what the processor says it has")

    def _built(self, compiler: list[str], flags: Sequence[str]) -> ctypes.CDLL:
        try:
            path = _folder() / f"kernels-{self._key(compiler, flags)}.so"
            if not path.exists():
                self._compile(compiler, flags, path)
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise UnavailableError(str(error)) from error

    def _key(self, compiler: list[str], flags: Sequence[str]) -> str:
        """What the result of compiling depends on."""
        digest = hashlib.sha256()
        for path in (*self.headers, *self.sources):
            digest.update(path.read_bytes())
        parts = (_version(compiler), " ".join(flags).encode(), _processor().encode())
        for part in parts:
            digest.update(part)
        return digest.hexdigest()[:20]

    def _compile(self, compiler: list[str], flags: Sequence[str], path: Path) -> None:
        """Compile to ``path``. OpenMP's library is not linked: torch has loaded one, two would fight for the cores."""
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            for command in (
                [*compiler, *flags, f"-I{SHARED}", "-c", *map(str, self.sources)],
                [*compiler, "-shared", *(f"{source.stem}.o" for source in self.sources), "-o", "kernels.so", "-lm"],
            ):
                done = _run(command, cwd=scratch)
                if done.returncode != 0:
                    why = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[0]
                    raise UnavailableError(f"{shlex.join(compiler)} failed: {why}")
            (Path(scratch) / "kernels.so").replace(path)


def _run(command: Sequence[str], cwd: str | None = None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, check=False, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{shlex.join(command[:1])}: {error}") from error


def _version(compiler: list[str]) -> bytes:
    done = _run([*compiler, "--version"])
    if done.returncode != 0:
        raise UnavailableError(f"{shlex.join(compiler)} --version failed")
    return done.stdout


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return platform.machine() + "".join(line for line in lines if line.startswith(_NAMES_OF_PROCESSORS))


def _folder() -> Path:
    """Where compiled files are kept, or a folder of the process's user where that cannot be written to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grouprl"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # the latter where nobody knows a home folder
        pass
    other = Path(tempfile.gettempdir()) / f"grouprl-{os.getuid()}"
    other.mkdir(mode=0o700, exist_ok=True)
    if other.stat().st_uid != os.getuid():
        raise UnavailableError(f"{other} belongs to somebody else")
    return other

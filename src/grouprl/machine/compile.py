"""C that is compiled where it runs: for this processor, at first use, by the system's compiler."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path

from grouprl.machine.compiler import (
    COMPILE_WITHIN,
    CompilationError,
    Compiler,
    HangingCompilerError,
    UnavailableError,
)
from grouprl.machine.private_folders import (
    NotPrivateError,
    PrivateFolder,
    folder_of_this_process,
    folders_to_keep_in,
    private_folder,
)

__all__ = ["Kernels", "UnavailableError"]

SHARED = Path(__file__).resolve().parent
"""Where what both arenas use is."""
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fno-math-errno", "-Wno-psabi")
_NAMES_OF_PROCESSORS = ("flags", "model name", "Features", "CPU implementer", "CPU variant", "CPU part")
_EXPORTED = re.compile(r"^\w+ (grouprl_\w+)\(", re.MULTILINE)
_DAY = 86400.0

_log = logging.getLogger("grouprl")
_said: set[str] = set()
_hanging: dict[str, str] = {}


class Kernels:
    """The functions of some C files, compiled once for this processor.

    The result is kept in ``$XDG_CACHE_HOME/grouprl`` (or ``~/.cache/grouprl``) under a name made of the sources, the
    compiler and the processor, if nobody else can change what is there (:mod:`~grouprl.machine.private_folders`), or
    in a folder for temporary files. Otherwise it serves this process alone, and a warning says so. ``$CC`` names
    another compiler than ``cc``.

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
        folder = folder.absolute()
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

    @property
    def why_not(self) -> str:
        """Why :meth:`functions` gives none, or ""."""
        return self._found if isinstance(self._found, str) else ""

    @cached_property
    def _found(self) -> ctypes.CDLL | str:
        """The compiled functions, or why there are none, as text: an exception would keep what its frames hold."""
        try:
            return self._load()
        except CompilationError as error:
            _say_once(f"There is no compiled code, and torch operations do its work, more slowly: {error}.")
            return str(error)
        except UnavailableError as error:
            return str(error)

    def _load(self) -> ctypes.CDLL:
        if sys.platform != "linux" or not os.path.isdir("/proc/self/fd"):
            raise UnavailableError(f"compiled code is for Linux with /proc, this is {sys.platform}")
        compiler = Compiler.of_the_system()
        import_module("torch")  # its OpenMP is the one the functions use
        _refuse_one_that_hung(compiler)
        try:
            for variant in self.variants:
                loaded = self._built(compiler, (*_FLAGS, *variant))
                if self.accept(loaded):
                    return loaded
        except HangingCompilerError as error:
            _remember_that_it_hung(compiler, str(error))
            raise
        except OSError as error:
            raise CompilationError(str(error)) from error
        raise UnavailableError("the system does not grant what the processor says it has")

    def _built(self, compiler: Compiler, flags: Sequence[str]) -> ctypes.CDLL:
        """The functions, kept or compiled now. Raises UnavailableError, or OSError if no folder will do."""
        name = f"kernels-{self._key(compiler, flags)}.so"
        problems = []
        for folder in _folders(make=True):
            try:
                with folder as kept:
                    loaded = self._kept(kept, name)
                    return self._compiled(compiler, flags, kept, name) if loaded is None else loaded
            except (OSError, NotPrivateError) as error:
                problems.append(str(error))
        with folder_of_this_process() as once:
            loaded = self._compiled(compiler, flags, once, name)
        _say_once(
            f"Compiled code could not be kept, so that every start compiles for some seconds: {'; '.join(problems)}. "
            "Set XDG_CACHE_HOME to a folder that you alone can write to."
        )
        return loaded

    def _key(self, compiler: Compiler, flags: Sequence[str]) -> str:
        """What the result of compiling depends on."""
        digest = hashlib.sha256()
        for path in (*self.headers, *self.sources):
            digest.update(path.read_bytes())
        for part in (compiler.version, " ".join(flags).encode(errors="surrogateescape"), _processor().encode()):
            digest.update(part)
        return digest.hexdigest()[:20]

    def _kept(self, folder: PrivateFolder, name: str) -> ctypes.CDLL | None:
        """What is kept under `name`, or None if it is not there, is damaged, or does not load any more."""
        try:
            return self._opened(folder, name)
        except CompilationError:
            return None

    def _compiled(self, compiler: Compiler, flags: Sequence[str], folder: PrivateFolder, name: str) -> ctypes.CDLL:
        """Compile, load, and keep what was loaded under `name`. Raises UnavailableError, OSError if it is the disk."""
        with folder.one_at_a_time(patience=COMPILE_WITHIN):
            loaded = self._kept(folder, name)  # by a process that was here before
            if loaded is not None:
                return loaded
            with folder.scratch() as scratch:
                made = Path(scratch / "made.so")
                self._compile(compiler.command, flags, made)
                scratch.write(name, made.read_bytes())
                loaded = self._opened(scratch, name)
                if loaded is None:
                    raise OSError(f"{folder.path}: what was written is not what is read")
                folder.take(scratch, name)
                return loaded

    def _compile(self, command: Sequence[str], flags: Sequence[str], path: Path) -> None:
        """Compile to `path`, and leave other files beside it. Raises CompilationError, or OSError if it is the disk."""
        Compiler(command).compile(self.sources, flags, SHARED, path)

    def _opened(self, folder: PrivateFolder, name: str) -> ctypes.CDLL | None:
        """The library in `folder`, with every function that the sources export, or None if there is no sound one.

        It is loaded by the descriptor through which it was checked. That stays open: the C library takes two libraries
        for one if they are loaded by the same path.

        Raises:
            CompilationError: it does not load, or lacks a function.
        """
        fd = folder.open(name)
        if fd is None:
            return None
        try:
            loaded = ctypes.CDLL(f"/proc/self/fd/{fd}")
        except OSError as error:
            os.close(fd)
            raise CompilationError(f"what the compiler made cannot be loaded ({error})") from error
        exported = {name for path in self.sources for name in _EXPORTED.findall(path.read_text(encoding="utf-8"))}
        missing = sorted(name for name in exported if not hasattr(loaded, name))
        if missing:
            raise CompilationError(f"what the compiler made lacks {', '.join(missing)}")
        return loaded


def _folders(*, make: bool) -> Iterator[AbstractContextManager[PrivateFolder]]:
    return (private_folder(path, make=make) for path in folders_to_keep_in())


def _refuse_one_that_hung(compiler: Compiler) -> None:
    """Raise HangingCompilerError if this compiler hung before, in this process or, within a day, in another one."""
    identity = compiler.identity()
    for folder in _folders(make=False):
        if identity in _hanging:
            break
        with suppress(OSError, NotPrivateError), folder as kept:
            reason = kept.read(_name_of_memory(identity))
            if reason is not None and time.time() - os.stat(kept / _name_of_memory(identity)).st_mtime < _DAY:
                where = kept.path / _name_of_memory(identity)
                _hanging[identity] = f"{reason.decode()}; it is tried again a day later, or once {where} is removed"
    if identity in _hanging:
        raise HangingCompilerError(_hanging[identity])


def _remember_that_it_hung(compiler: Compiler, reason: str) -> None:
    identity = compiler.identity()
    _hanging[identity] = reason
    for folder in _folders(make=True):
        with suppress(OSError, NotPrivateError), folder as kept, kept.scratch() as scratch:
            scratch.write(_name_of_memory(identity), reason.encode(errors="replace"))
            kept.take(scratch, _name_of_memory(identity))
            return


def _name_of_memory(identity: str) -> str:
    return f"hung-{identity}"


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning(text)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return platform.machine() + "".join(line for line in lines if line.startswith(_NAMES_OF_PROCESSORS))

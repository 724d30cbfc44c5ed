"""The system's C compiler: which one it is, and one run of it that may fail, hang or write rubbish."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import struct
import subprocess
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

ANSWER_WITHIN = 10.0
"""Seconds that a compiler has to say its version."""
COMPILE_WITHIN = 60.0
"""Seconds that it has for one command; two are usual."""
_DISK_IS_FULL = ("No space left on device", "Disk quota exceeded", "Read-only file system")


class UnavailableError(RuntimeError):
    """There is no compiled code here; the message says why."""


class CompilationError(UnavailableError):
    """There is a compiler, and nevertheless no compiled code: the user may not expect that."""


class HangingCompilerError(CompilationError):
    """The compiler did not finish."""


class Compiler:
    """A C compiler.

    Args:
        command: the words that start it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        first, *rest = command
        # It will run in another folder.
        self.command = [os.path.abspath(first) if os.sep in first else first, *rest]
        self.name = shlex.join(self.command)

    @classmethod
    def of_the_system(cls) -> Compiler:
        """What ``$CC`` names, or else ``cc``, ``gcc`` or ``clang``. Raises UnavailableError if there is none."""
        found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if found is None:
            raise UnavailableError("there is no C compiler (cc, gcc or clang; install gcc, or set CC)")
        try:
            command = shlex.split(found)
        except ValueError as error:
            raise UnavailableError(f"CC={found!r} is no command ({error})") from error
        if not command:
            raise UnavailableError(f"CC={found!r} is no command")
        return cls(command)

    def identity(self) -> str:
        """A name for the program that ``$CC`` means now, found without running it."""
        parts = [self.name]
        for word in self.command:  # every word: "ccache gcc", "sh wrapper"
            path = shutil.which(word)
            if path is not None:
                info = os.stat(path)
                parts.append(f"{os.path.realpath(path)} {info.st_size} {info.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:20]

    @cached_property
    def version(self) -> bytes:
        """What it says about itself. Raises UnavailableError."""
        done = self._run(["--version"], None, ANSWER_WITHIN)
        if done.returncode != 0:
            raise UnavailableError(f"{self.name} --version failed")
        return done.stdout

    def compile(self, sources: Sequence[Path], flags: Sequence[str], headers: Path, path: Path) -> None:
        """Make a shared library of `sources`, which may include `headers`, at `path`; other files are left beside it.

        OpenMP's library is not linked: torch has loaded one, two would fight for the cores.

        Raises:
            CompilationError: it cannot be made.
            OSError: the disk is full, or cannot be written to.
        """
        objects = [f"{source.stem}.o" for source in sources]
        for arguments in (
            [*flags, f"-I{headers}", "-c", *map(str, sources)],
            ["-shared", *objects, "-o", path.name, "-lm"],
        ):
            done = self._run(arguments, path.parent, COMPILE_WITHIN)
            if done.returncode != 0:
                said = done.stderr.decode(errors="replace").strip()
                full = next((reason for reason in _DISK_IS_FULL if reason in said), None)
                if full is not None:
                    raise OSError(f"{self.name}: {full}")
                raise CompilationError(f"{self.name} failed: {(said.splitlines() or ['no message'])[0]}")
        content = path.read_bytes() if path.is_file() else b""
        if not _is_whole(content):
            raise CompilationError(f"{self.name} wrote no whole library ({len(content)} bytes)")

    def _run(self, arguments: Sequence[str], folder: Path | None, within: float) -> subprocess.CompletedProcess[bytes]:
        """Run it in `folder`, temporary files included, with all that it starts in a group that can be ended."""
        environment = {**os.environ, "LC_ALL": "C"}
        if folder is not None:
            environment["TMPDIR"] = "."
        try:
            process = subprocess.Popen(
                [*self.command, *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            expected = isinstance(error, FileNotFoundError | PermissionError)  # else nothing is left to start it with
            kind = UnavailableError if expected else CompilationError
            raise kind(f"{self.name}: {error}") from error
        except ValueError as error:
            raise UnavailableError(f"{self.name}: {error}") from error
        try:
            out, err = process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            raise HangingCompilerError(f"{self.name} {arguments[0]} did not finish within {within:g} s") from None
        finally:  # Ctrl-C as well: the compiler is in another session and does not hear it
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _is_whole(library: bytes) -> bool:
    """Whether it is a 64-bit ELF file whose table of sections, at its end, is there: half of one ends the process."""
    if len(library) < 64 or library[:5] != b"\x7fELF\x02":
        return False
    order = "<" if library[5] == 1 else ">"
    sections: int = struct.unpack_from(order + "Q", library, 40)[0]
    size, number = struct.unpack_from(order + "HH", library, 58)
    return bool(0 < sections <= len(library) - size * number)

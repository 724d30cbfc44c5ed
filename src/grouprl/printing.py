"""Printing what models, files and other people wrote: no character and no closed or full terminal ends a run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_CONTROL = re.compile("(?!\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What a terminal does instead of showing it, and what turns the order of the text around; not tab and line ends."""


def visible(text: str) -> str:
    """``text`` that does nothing to a terminal, such as clear it: control characters are written as ``\\x1b``."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def in_markdown(text: object) -> str:
    """A text of others for one line of Markdown, which it does not end, without control characters and HTML."""
    return visible(" ".join(str(text).split())).replace("<", "&lt;")


def show(text: str, file: TextIO | None = None) -> None:
    """Print ``text`` on ``file``, by default standard output, with its control characters made `visible`.

    What its encoding lacks is written as ``\\xe4``, ``\\u20ac``. Nothing happens if nobody can read it any more.
    """
    text = visible(text)
    stream = sys.stdout if file is None else file
    if stream is not None:
        lasting = LastingStream(stream)
        lasting.write(text + "\n")
        lasting.flush()


class LastingStream:
    """A text stream that takes any text and lasts: after an error of the system it swallows what is written.

    Attributes:
        error: the first error of the system, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write as much of ``text`` as the encoding has, and the rest escaped."""
        if self.error is not None:
            return len(text)
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # full, without a reader, closed
            self.error = self.error or error
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As ``write``."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what was written."""
        if self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # whoever has it writes past this object
            raise AttributeError(name)
        return getattr(self._stream, name)

    def discard(self) -> None:
        """Have the system throw away what waits in the stream, which would raise once more when the process ends."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_streams() -> Iterator[Callable[[], str | None]]:
    """Within, standard output and standard error are `LastingStream`.

    Yields a function that says what kept standard output from being written. None: nothing did, or its reader has left,
    as ``head`` does once it has its lines.
    """
    before = sys.stdout, sys.stderr
    out, err = (None if stream is None else LastingStream(stream) for stream in before)
    sys.stdout, sys.stderr = out, err

    def problem() -> str | None:
        if out is None:
            return None
        out.flush()
        if out.error is None or isinstance(out.error, BrokenPipeError):
            return None
        return getattr(out.error, "strerror", None) or str(out.error)

    try:
        yield problem
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            if stream is not None:
                stream.flush()
                if stream.error is not None:
                    stream.discard()

"""The two kinds of error a user can meet. Every message says what was given, what is allowed and how to fix it."""

import traceback
from collections.abc import Sequence

from grouprl.redaction import redact


class GrouprlError(Exception):
    """Base of every error grouprl raises on purpose; the command line prints its message without a traceback.

    Its message holds no secrets, such as a token among the settings that it quotes.
    """

    def __str__(self) -> str:
        return redact(super().__str__())


class UsageError(GrouprlError, ValueError):
    """What was asked for cannot be done: a bad value, an unknown name, a missing extra, a foreign file."""


class DamagedFileError(UsageError):
    """A file of a run cannot be used: it is damaged, foreign, of another kind, or cannot be read."""


class TrainingError(GrouprlError, RuntimeError):
    """Something broke while training ran: an environment died, or a number stopped being finite."""


def refuse(refused: Sequence[str]) -> None:
    """Raises UsageError with everything that was refused, each on a line of its own; does nothing if that is nothing.

    A person who brings a script with five such settings should not have to start it five times to learn of them.
    """
    if len(refused) > 1:
        raise UsageError("these cannot stay as they are:" + "".join(f"\n  {one}" for one in refused))
    if refused:
        raise UsageError(refused[0])


_LONGEST_LINE = 500


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut, without its full stop; those of other libraries go on for pages."""
    line = (_message(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def error_text(error: BaseException, *, whole: bool = False) -> str:
    """An error for a message: its kind and the first line of what it says, or its kind alone where it says nothing.

    Args:
        whole: all lines, uncut, for a reader who sees nothing else of the error, such as another process.
    """
    kind, said = type(error).__name__, _message(error) if whole else first_line(error)
    return kind if said in ("", kind) else f"{kind}: {said}"


def line_of_fault(error: BaseException) -> str:
    """Where an error was raised, to be added to its text: ``, at line 3 of game.py``; "" if nobody knows."""
    frames = traceback.extract_tb(error.__traceback__)
    return f", at line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of a class of the user's
        return ""


def shown(value: object, width: int = 80) -> str:
    """A value for a message: what ``repr`` says on one line, cut where it is long. Never raises."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a class of the user's, or an integer of thousands of digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= width else text[: width - 3] + "..."


def with_type(value: object, width: int = 60) -> str:
    """As `shown`, with the name of the value's type behind it."""
    return f"{shown(value, width)} ({type(value).__name__})"

"""A time limit for a call into code of the user's, which may never return."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_AGAIN = 1.0
"""Seconds between two attempts to end a call that goes on in spite of the first."""

_LOOK = 0.2
"""Seconds of computing between two looks at the time that is left."""

_ATTEMPTS = 10
"""After so many the process ends instead: code that handles every exception for ever leaves no other way."""

gave_up = False
"""Whether some call was given up because its time was over: threads that it started may go on."""


class Expired(BaseException):
    """Raised within the call. It is no ``Exception``, so that code which handles those does not take it for its own."""


_of_thread = threading.local()


@contextlib.contextmanager
def handing_over(to_main: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """In this thread, while the context is open, calls that compute are handed to ``to_main``.

    It has the main thread call what it is given, waits, and returns or raises what that did.
    """
    _of_thread.to_main = to_main
    try:
        yield
    finally:
        del _of_thread.to_main


def within(
    seconds: float | None, call: Callable[[], T], progress: Callable[[], int] | None = None, name: str = "a call",
    *, computes: bool = False,
) -> T:  # fmt: skip
    """What ``call()`` returns, if it does in time; None: whenever it does.

    With ``progress``, a number that grows while the call gets on, the time counts from its last change.

    In the main thread the call is interrupted, where it waits as well as where it computes. If it handles that like
    any other exception and goes on, again and again, the process ends with a line that tells of ``name``: files are
    written beside their place and then moved, so the newest checkpoint stays. In another thread, and on
    Windows, the call runs in a thread beside, which ends as soon as it is back from what it waits for.

    A call that computes within C, such as a regular expression that backtracks, keeps Python's lock, so that no other
    thread runs, and none could end it. The main thread can be interrupted there. So a call that ``computes`` is made
    there if this thread is :func:`handing_over`.

    Raises TimeoutError when ``seconds`` are over, and whatever the call raises.
    """
    if seconds is None:
        return call()
    to_main = getattr(_of_thread, "to_main", None)
    if computes and to_main is not None:
        return to_main(lambda: within(seconds, call, progress, name))  # type: ignore[no-any-return]
    in_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill")
    left = _Left(seconds, progress)
    try:
        return _interrupted(left, call, name) if in_main else _beside(left, call)
    except TimeoutError:
        global gave_up
        gave_up = True
        raise


class _Left:
    """The time that is left: asked again and again, by the thread that waits."""

    def __init__(self, seconds: float, progress: Callable[[], int] | None) -> None:
        self._seconds, self._progress = seconds, progress
        self._moved, self._done = time.monotonic(), 0 if progress is None else progress()

    def now(self) -> float:
        """Seconds left, not above 0 once they are over."""
        if self._progress is not None and (done := self._progress()) != self._done:
            self._done, self._moved = done, time.monotonic()
        return self._seconds - (time.monotonic() - self._moved)

    def until_next_look(self) -> float:
        """Seconds to wait before asking again."""
        left = max(0.0, self.now())
        return left if self._progress is None else min(left, self._seconds / 10)


def _interrupted(left: _Left, call: Callable[[], T], name: str) -> T:
    """By SIGURG, which nobody else uses, so that the alarms of the call are its own."""
    running, over = True, threading.Event()
    me = threading.get_ident()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if running:
            raise Expired

    def wait() -> None:
        while not over.wait(left.until_next_look()):
            if left.now() <= 0:
                break
        for _ in range(_ATTEMPTS):
            if over.is_set():
                return
            signal.pthread_kill(me, signal.SIGURG)
            over.wait(_AGAIN)
        if not over.is_set():
            _end_process(f"{name} has gone on {_ATTEMPTS} times after its time was over, because it handles every "
                         "exception; let it handle none but those it knows (except ValueError:, say)")  # fmt: skip

    def look(number: int, frame: FrameType | None) -> None:
        if running and left.now() <= 0:
            raise Expired

    before = signal.signal(signal.SIGURG, interrupt)
    timer = threading.Thread(target=wait, name="grouprl-time-limit", daemon=True)
    try:
        try:
            timer.start()
            with _looking(look):
                return call()
        finally:
            running = False
    except Expired:
        running = False
        raise TimeoutError from None
    finally:
        over.set()
        if timer.is_alive():
            timer.join()
        signal.signal(signal.SIGURG, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def _looking(look: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While this is open, the main thread calls ``look`` again and again, as long as the process computes.

    A thread that waits for the end of the time does not run while C code keeps Python's lock. The system's timer does,
    and a regular expression looks for signals as it goes. SIGVTALRM is hardly used; whoever does use it keeps it.
    """
    if signal.getsignal(signal.SIGVTALRM) not in (signal.SIG_DFL, _nothing):
        yield
        return
    signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, _LOOK, _LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, _nothing)  # and not the default, by which a late signal would end the process


def _nothing(number: int, frame: FrameType | None) -> None:
    """For a signal that comes when nobody waits for it any more."""


def _end_process(why: str) -> None:
    """End it at once, without asking any code that still runs."""
    with contextlib.suppress(Exception):
        print(f"\nerror: {why}. This process ends now; the newest checkpoint is whole.", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(1)


def _beside(left: _Left, call: Callable[[], T]) -> T:
    context = contextvars.copy_context()
    returned: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(context.run(call))
        except BaseException as error:  # handed over, to be raised where it was called for
            raised.append(error)

    thread = threading.Thread(target=run, name="grouprl-limited", daemon=True)
    thread.start()
    while thread.is_alive() and left.now() > 0:
        thread.join(left.until_next_look())
    if thread.is_alive():
        end_thread(thread)
        raise TimeoutError
    if raised:
        raise raised[0]
    return returned[0]  # type: ignore[no-any-return]


def end_thread(thread: threading.Thread) -> None:
    """Ask a thread to end, and wait a moment for it: it does when it next runs a line of Python."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Expired))
        thread.join(_AGAIN)

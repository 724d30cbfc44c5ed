"""An event loop for asynchronous functions of the user's, rewards and tools, in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from grouprl.runs.time_limit import end_thread
from grouprl.runs.watchdog import Watch

_GRACE = 1.0
"""Seconds that cancelled functions have to tidy up."""


class Late(NamedTuple):
    """In the place of a result: the function had not returned when its time was over."""


class EventLoop:
    """Works inside a notebook, whose own loop is running, and clients that belong to a loop keep theirs.

    The thread is started at the first call. It ends with this object, and when functions are late.
    """

    def __init__(self) -> None:
        self._running: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
        self._end: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def gather(self, calls: Mapping[Watch, Awaitable[Any]], seconds: float | None) -> list[Any]:
        """Wait for all side by side, at most ``seconds``.

        In the place of a result stands the exception that prevented it, or `Late`.
        """
        loop, thread = self._start()
        results: dict[Watch, Any] = {watch: Late() for watch in calls}

        async def all_of_them() -> None:
            await asyncio.gather(*(_result(watch, awaited, results) for watch, awaited in calls.items()))

        future = asyncio.run_coroutine_threadsafe(all_of_them(), loop)
        try:
            future.result(seconds)
        except concurrent.futures.TimeoutError:
            late = list(results.values())
            self._abandon(loop, thread)
            return late
        except BaseException:  # Ctrl-C: the functions must not go on unseen
            future.cancel()
            raise
        return list(results.values())

    def run(self, awaited: Awaitable[Any], seconds: float | None) -> Any:
        """What one awaitable returns; several threads may each wait for one.

        Raises TimeoutError, without a message, after ``seconds``, and whatever the awaitable raises.
        """
        loop, thread = self._start()
        future = asyncio.run_coroutine_threadsafe(_outcome(awaited), loop)
        try:
            result, error = future.result(seconds)
        except concurrent.futures.TimeoutError:
            future.cancel()
            if not _answers(loop):  # it is blocked by a call that does not let go of it
                self._abandon(loop, thread)
            raise TimeoutError from None
        except concurrent.futures.CancelledError:  # another thread found the loop blocked
            raise TimeoutError from None
        except BaseException:  # Ctrl-C
            future.cancel()
            raise
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Cancel what still runs and end the thread; `gather` starts another one."""
        running = self._running
        if running is not None:
            self._leave(*running)

    def _abandon(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        """Leave a loop whose time is over."""
        self._leave(loop, thread)
        if thread.is_alive():
            end_thread(thread)

    def _leave(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        """End a loop. Several threads may find that it is blocked, and none of them may end the one that came after."""
        with self._lock:
            if self._running is not None and self._running[0] is loop:
                self._running = None
                self._end()
        thread.join(_GRACE)

    def _start(self) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
        with self._lock:
            if self._running is None:
                loop, ending = asyncio.new_event_loop(), threading.Event()
                thread = threading.Thread(target=_serve, args=(loop, ending), name="grouprl-rewards", daemon=True)
                thread.start()
                self._running = loop, thread
                self._end = weakref.finalize(self, _stop, loop, ending)
            return self._running


async def _outcome(awaited: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """What it returns or raises: sys.exit in it must not end the thread of the loop."""
    try:
        return await awaited, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error


def _answers(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop gets to run anything within a moment."""
    seen = threading.Event()
    with contextlib.suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(seen.set)
    return seen.wait(_GRACE)


async def _result(watch: Watch, awaited: Awaitable[Any], results: dict[Watch, Any]) -> None:
    with watch:
        try:
            results[watch] = await awaited
        except BaseException as error:  # sys.exit too, which would end the loop's thread and leave us waiting for ever
            results[watch] = error


def _serve(loop: asyncio.AbstractEventLoop, ending: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    while not ending.is_set():
        with contextlib.suppress(BaseException):  # a task of the function's own called sys.exit: the others go on
            loop.run_forever()
    with contextlib.suppress(BaseException):  # of functions that are given up
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=_GRACE / 2))
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, ending: threading.Event) -> None:
    ending.set()
    with contextlib.suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(loop.stop)

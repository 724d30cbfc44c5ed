"""Replies of partners, asked for in threads, so that sampling goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any

from grouprl.lm.sample.turns import Partner, Reply, Turn
from grouprl.machine.torch_defaults import torch_defaults
from grouprl.runs.time_limit import handing_over

THREADS = 64
"""The most replies that are worked on at once. A thread that waits for a tool costs little."""

_WAIT = 0.5
"""Seconds after which a wait looks up, so that an interruption is heard on every system."""

_Answer = tuple[int, Reply | BaseException]


class _Handed:
    """A call that a thread has the main thread make."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def make(self) -> None:
        try:
            with torch_defaults():
                self._outcome.put((self._call(), None))
        except (Exception, SystemExit) as error:  # which is the partner's; an interruption is the main thread's
            self._outcome.put((None, error))

    def result(self, closed: Callable[[], bool]) -> Any:
        """What came of it. Raises what it raised, and RuntimeError if nobody takes replies any more."""
        while True:
            try:
                value, error = self._outcome.get(timeout=_WAIT)
            except Empty:
                if closed():
                    raise RuntimeError("sampling has ended") from None
                continue
            if error is not None:
                raise error
            return value


class Replies:
    """Asks a partner for replies. Use :func:`replies_of`, which ends the threads.

    Args:
        partner: the partner. threads: the most calls at once.
    """

    def __init__(self, partner: Partner, threads: int) -> None:
        self._partner, self._most = partner, threads
        self._asked: SimpleQueue[tuple[int, Turn] | None] = SimpleQueue()
        self._answered: SimpleQueue[_Answer | _Handed] = SimpleQueue()
        self._in_main, self._closed = threading.current_thread() is threading.main_thread(), False
        self._threads: list[threading.Thread] = []
        self.due = 0
        """The number of replies that were asked for and not yet taken."""

    def ask(self, episode: int, turn: Turn) -> None:
        """Ask for the reply to a turn."""
        self.due += 1
        if len(self._threads) < min(self.due, self._most):
            # Daemons: a call that never returns must not keep the program from ending.
            self._threads.append(threading.Thread(target=self._work, name="grouprl-reply", daemon=True))
            self._threads[-1].start()
        self._asked.put((episode, turn))

    def take(self, at_least: int) -> list[tuple[int, Reply]]:
        """The replies that have come, in the order of their episodes; waits until there are ``at_least`` so many.

        Raises whatever the partner raised.
        """
        found: list[tuple[int, Reply]] = []
        while self.due and (len(found) < at_least or not self._answered.empty()):
            try:
                answer = self._answered.get(timeout=_WAIT)
            except Empty:
                continue
            if isinstance(answer, _Handed):
                answer.make()
                continue
            episode, reply = answer
            self.due -= 1
            if isinstance(reply, BaseException):
                raise reply
            found.append((episode, reply))
        return sorted(found, key=lambda answer: answer[0])

    def close(self) -> None:
        """Let the threads end, each as soon as the call that it is in returns."""
        self._closed = True
        while not self._asked.empty():
            self._asked.get()
        for _ in self._threads:
            self._asked.put(None)

    def _work(self) -> None:
        with handing_over(self._by_main) if self._in_main else nullcontext():
            while (question := self._asked.get()) is not None:
                episode, turn = question
                try:
                    self._answered.put((episode, self._partner.reply(episode, turn)))
                except BaseException as error:
                    self._answered.put((episode, error))

    def _by_main(self, call: Callable[[], Any]) -> Any:
        """Have the main thread make a call when it next takes replies."""
        handed = _Handed(call)
        self._answered.put(handed)
        return handed.result(lambda: self._closed)


@contextmanager
def replies_of(partner: Partner, episodes: int) -> Iterator[Replies]:
    """The replies of a partner to so many episodes. When the context closes, threads end."""
    replies = Replies(partner, min(episodes, THREADS))
    try:
        yield replies
    finally:
        replies.close()

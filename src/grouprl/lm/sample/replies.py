"""Replies of partners, asked for in threads, so that sampling goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from grouprl.lm.sample.turns import Partner, Reply, Turn

THREADS = 64
"""The most replies that are worked on at once. A thread that waits for a tool costs little."""

_WAIT = 0.5
"""Seconds after which a wait looks up, so that an interruption is heard on every system."""

_Answer = tuple[int, Reply | BaseException]


class Replies:
    """Asks a partner for replies. Use :func:`replies_of`, which ends the threads.

    Args:
        partner: the partner. threads: the most calls at once.
    """

    def __init__(self, partner: Partner, threads: int) -> None:
        self._partner, self._most = partner, threads
        self._asked: SimpleQueue[tuple[int, Turn] | None] = SimpleQueue()
        self._answered: SimpleQueue[_Answer] = SimpleQueue()
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
                episode, reply = self._answered.get(timeout=_WAIT)
            except Empty:
                continue
            self.due -= 1
            if isinstance(reply, BaseException):
                raise reply
            found.append((episode, reply))
        return sorted(found, key=lambda answer: answer[0])

    def close(self) -> None:
        """Let the threads end, each as soon as the call that it is in returns."""
        while not self._asked.empty():
            self._asked.get()
        for _ in self._threads:
            self._asked.put(None)

    def _work(self) -> None:
        while (question := self._asked.get()) is not None:
            episode, turn = question
            try:
                self._answered.put((episode, self._partner.reply(episode, turn)))
            except BaseException as error:
                self._answered.put((episode, error))


@contextmanager
def replies_of(partner: Partner, episodes: int) -> Iterator[Replies]:
    """The replies of a partner to so many episodes. When the context closes, threads end."""
    replies = Replies(partner, min(episodes, THREADS))
    try:
        yield replies
    finally:
        replies.close()

"""Processes of one host exchange messages by sockets of their own; here they are threads."""

from __future__ import annotations

import itertools
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from grouprl.errors import TrainingError
from grouprl.machine import local_exchange
from grouprl.machine.local_exchange import LocalExchange, connect
from grouprl.machine.ranks import Place, Ranks

T = TypeVar("T")


class Meeting:
    """Another way for threads to exchange values, which the sockets are connected by."""

    def __init__(self, world: int) -> None:
        self.world, self._barrier, self._values = world, threading.Barrier(world), [None] * world

    def gather_of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait(20)
            found = list(self._values)
            self._barrier.wait(20)
            return found

        return gather

    def of_all(self, function: Callable[[int], T]) -> list[T]:
        """What the function gives for each rank, all at once."""
        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(function, range(self.world)))


@contextmanager
def connected(world: int, timeout: float = 20.0) -> Iterator[tuple[Meeting, list[LocalExchange]]]:
    meeting = Meeting(world)
    made = meeting.of_all(lambda rank: connect(rank, world, meeting.gather_of(rank), timeout))
    lines = [line for line in made if line is not None]
    assert len(lines) == world
    try:
        yield meeting, lines
    finally:
        for line in lines:
            line.close()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_process_gets_the_messages_of_all_in_their_order(world: int) -> None:
    with connected(world) as (meeting, lines):
        for size in (0, 1, 70_000, 5_000_000, 3):  # larger than what sockets hold, at both ends at once
            sent = [secrets.token_bytes(size * (rank != 1)) for rank in range(world)]
            assert meeting.of_all(lambda rank, sent=sent: lines[rank].gather(sent[rank])) == [sent] * world


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_process_that_ends_ends_the_exchange_of_all_others(gone: int) -> None:
    with connected(3) as (meeting, lines):

        def exchange(rank: int) -> str:
            ranks = Ranks(Place(rank, 3))
            ranks._local = lines[rank]
            if rank == gone:
                lines[rank].close()
                return "gone"
            with pytest.raises(TrainingError, match=f"rank {rank} lost another rank"):
                ranks.gather(rank)
            return "told"

        assert sorted(meeting.of_all(exchange)) == ["gone", "told", "told"]


def test_a_process_that_hangs_is_waited_for_no_longer_than_asked() -> None:
    with connected(2, timeout=0.05) as (_, lines):
        ranks = Ranks(Place(0, 2))
        ranks._local = lines[0]
        with pytest.raises(TrainingError, match=r"rank 0 waited too long for another rank.*ddp_timeout"):
            ranks.gather(None)


@pytest.mark.parametrize("timeout", [4_294_968.0, 1e12])
def test_no_wait_is_too_long_to_be_asked_for(timeout: float) -> None:
    with connected(2, timeout) as (meeting, lines):
        assert meeting.of_all(lambda rank: lines[rank].gather(b"x")) == [[b"x", b"x"]] * 2
        assert all(peer.gettimeout() * 1000 < 2**31 for line in lines for peer in line._peers)


def test_processes_on_several_hosts_have_no_such_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {rank: f"host {rank}" for rank in (0, 1)}
    monkeypatch.setattr(local_exchange, "this_host", lambda: (threading.current_thread().name,))
    meeting = Meeting(2)

    def of_rank(rank: int) -> LocalExchange | None:
        threading.current_thread().name = names[rank]
        return connect(rank, 2, meeting.gather_of(rank), 20)

    assert meeting.of_all(of_rank) == [None, None]


def test_where_one_process_cannot_connect_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    own, numbers = socket.create_connection, itertools.count()

    def refuse_the_second(*given: Any, **named: Any) -> socket.socket:
        if next(numbers) == 1:
            raise ConnectionRefusedError
        return own(*given, **named)

    own_accept, accepted = socket.socket.accept, []

    def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
        peer, address = own_accept(listener)
        accepted.append(peer)
        return peer, address

    monkeypatch.setattr(socket, "create_connection", refuse_the_second)
    monkeypatch.setattr(socket.socket, "accept", accept)
    meeting = Meeting(3)
    assert meeting.of_all(lambda rank: connect(rank, 3, meeting.gather_of(rank), 20, patience=0.1)) == [None] * 3
    assert [peer.fileno() for peer in accepted] == [-1]  # closed, as nobody will use it


@pytest.mark.parametrize("said", [b"x" * 32 + (1).to_bytes(8, "little"), b"x", b""])
def test_a_stranger_who_does_not_know_the_key_is_turned_away(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(local_exchange, "_INTRODUCTION", 0.2)
    own, strangers = socket.create_connection, []

    def after_a_stranger(address: Any, **given: Any) -> socket.socket:
        stranger = own(address)
        stranger.sendall(said)
        strangers.append(stranger)
        return own(address, **given)

    monkeypatch.setattr(socket, "create_connection", after_a_stranger)
    with connected(3) as (meeting, lines):
        assert meeting.of_all(lambda rank: lines[rank].gather(b"%d" % rank)) == [[b"0", b"1", b"2"]] * 3
    assert [stranger.recv(1) for stranger in strangers] == [b"", b""]

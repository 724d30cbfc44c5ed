"""Messages among processes of one host: each sends its own to the first, which sends all of them to each.

Gloo, the backend of torch.distributed for CPUs, receives in a thread of its own. This thread asks a socket again and
again while another thread holds it. Where the processes fill the cores, it does so on the core that the other thread
needs, for up to a slice of the scheduler. An exchange of some bytes then takes about 1.5 ms, and sockets on which each
process sleeps until it is its turn take 0.1 ms. Environments are stepped some hundred times between two updates, with
an exchange at each step. Tensors, which are few and large, stay with torch.distributed.
"""

from __future__ import annotations

import hmac
import os
import pickle
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

_LENGTH = 8
"""Bytes in which a message says how many bytes follow."""

_INTRODUCTION = 5.0
"""Seconds in which whoever connects must say who it is; the others wait meanwhile."""

_LONGEST = 2_000_000.0
"""Seconds that a wait may take, 23 days: the system counts milliseconds, of at most 2^31."""

Gather = Callable[[Any], list[Any]]
"""Gives the values of all processes, in their order, for that of this one."""


def this_host() -> tuple[str, ...]:
    """What is the same in two processes only if they run on one host and share its network."""
    found = [socket.gethostname()]
    with suppress(OSError):  # another system than Linux
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        found.append(os.readlink("/proc/self/ns/net"))
    return tuple(found)


def connect(rank: int, world: int, gather: Gather, timeout: float, patience: float = 60.0) -> LocalExchange | None:
    """Connect the processes of a training if all of them run on this host.

    Args:
        rank: the number of this process. world: how many there are. gather: another way to exchange, for the start.
        timeout: seconds to wait for another process in an exchange. patience: seconds to wait for a connection.

    Returns:
        None, in all processes, if they run on several hosts, or if one of them cannot connect.
    """
    if any(host != this_host() for host in gather(this_host())):
        return None
    listener: socket.socket | None = None
    offer: tuple[int, bytes] | None = None
    if rank == 0:
        with suppress(OSError):  # a host without a loopback
            listener = socket.create_server(("127.0.0.1", 0), backlog=world)
            offer = listener.getsockname()[1], secrets.token_bytes(32)
    peers: list[socket.socket] = []
    with nullcontext() if listener is None else listener:
        offer = gather(offer)[0]
        if offer is not None:
            port, key = offer
            with suppress(OSError):
                if listener is None:
                    peers = [socket.create_connection(("127.0.0.1", port), timeout=patience)]
                    peers[0].sendall(key + rank.to_bytes(_LENGTH, "little"))
                else:
                    peers = _accepted(listener, key, world, patience)
    made = LocalExchange(rank, peers, timeout)
    if all(gather(len(peers) == (world - 1 if rank == 0 else 1))):
        return made
    made.close()
    return None


def _accepted(listener: socket.socket, key: bytes, world: int, patience: float) -> list[socket.socket]:
    """The connections of the other processes, in their order. Whoever does not know the key is turned away."""
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + patience
    try:
        while len(found) < world - 1:
            listener.settimeout(max(0.001, end - time.monotonic()))
            peer, _ = listener.accept()
            number = _number(peer, key)
            if 0 < number < world and number not in found:
                found[number] = peer
            else:
                peer.close()
    except OSError:  # somebody did not come
        for peer in found.values():
            peer.close()
        raise
    return [found[number] for number in range(1, world)]


def _number(peer: socket.socket, key: bytes) -> int:
    """The number of the process at the other end; 0 for a stranger, who says another thing, or nothing."""
    with suppress(OSError):
        peer.settimeout(_INTRODUCTION)
        said = peer.recv(len(key) + _LENGTH)  # what is sent at once comes at once, on one host
        if hmac.compare_digest(said[: len(key)], key):
            return int.from_bytes(said[len(key) :], "little")
    return 0


class LocalExchange:
    """Exchanges of bytes among the processes of one host.

    Args:
        rank: the number of this process.
        peers: connections: of the first process to all others in their order, of any other to the first.
        timeout: seconds to wait for another process.
    """

    def __init__(self, rank: int, peers: list[socket.socket], timeout: float) -> None:
        self._first, self._peers = rank == 0, peers
        for peer in peers:
            peer.settimeout(min(timeout, _LONGEST))
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all processes, in their order.

        Raises OSError if another process ended, or does not answer in time. No exchange is possible after that.
        """
        try:
            if not self._first:
                _send(self._peers[0], message)
                found: list[bytes] = pickle.loads(_receive(self._peers[0]))
                return found
            found = [message, *map(_receive, self._peers)]
            answer = pickle.dumps(found, pickle.HIGHEST_PROTOCOL)
            for peer in self._peers:
                _send(peer, answer)
            return found
        except BaseException:  # what was half sent or read makes no sense to anybody; the others notice the end
            self.close()
            raise

    def close(self) -> None:
        """End the connections, which the other processes notice at their next exchange."""
        for peer in self._peers:
            peer.close()


def _send(peer: socket.socket, message: bytes) -> None:
    peer.sendall(len(message).to_bytes(_LENGTH, "little") + message)


def _receive(peer: socket.socket) -> bytes:
    return bytes(_exactly(peer, int.from_bytes(_exactly(peer, _LENGTH), "little")))


def _exactly(peer: socket.socket, size: int) -> bytearray:
    found = bytearray(size)
    rest = memoryview(found)
    while rest:
        read = peer.recv_into(rest)
        if read == 0:
            raise ConnectionResetError("the other process ended")
        rest = rest[read:]
    return found

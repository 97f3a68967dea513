"""Notices at once that a neighbouring rank has died, whoever started it."""

import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from medvlp import distributed
from medvlp.network import route_to
from medvlp.ranks import detect

_GOODBYE = b"."
#: Seconds to reach a neighbour. One that cannot be reached (a firewall) is not watched.
_MEETING_SECONDS = 10.0
#: Linux asks for a sign of the other machine after 30 s, every 10 s, and gives it up after three without one.
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))

_open: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def _close_copies() -> None:
    for connection in _open:
        connection.close()


# Else a data worker, which is a fork, would keep open what Linux closes when its rank dies.
os.register_at_fork(after_in_child=_close_copies)


class Neighbours:
    """A chain: each rank keeps a connection to the one before it, over which nothing is said but a goodbye.

    Linux ends the connections of a process that dies at once, and those of a machine that is gone within a
    minute; a process that is only stopped keeps them. So it does not matter who started the ranks: torchrun
    ends those of its own node, srun none, and under NCCL all others would wait for a time-out.

    Args:
        lost: is told the rank of a neighbour that ended without a goodbye, in a thread.
    """

    def __init__(self, lost: Callable[[int], None]):
        self._lost = lost
        self._leaving = threading.Event()
        self._connections: list[socket.socket] = []
        self._machines: list[str] = []

    def meet(self) -> None:
        """Connect to the neighbours; a collective of all ranks."""
        rank, ranks = distributed.rank(), distributed.world_size()
        if ranks == 1:
            return
        host = route_to(detect().address).address or "127.0.0.1"
        token = secrets.token_hex(16)  # who connects without it is no neighbour
        with socket.create_server((host, 0), backlog=4) as server:
            own = [socket.gethostname(), *server.getsockname()[:2], token]
            told = distributed.gather_objects(own)
            self._machines = [machine for machine, *_ in told]
            if rank > 0:
                _, address, port, its_token = told[rank - 1]
                self._watch(_visit(address, port, its_token.encode()), rank - 1)
            if rank + 1 < ranks:
                self._watch(_await(server, token.encode()), rank + 1)

    def name(self, rank: int) -> str:
        """A rank and the machine it runs on."""
        return f"rank {rank} on {self._machines[rank]}"

    def leave(self, goodbye: bool) -> None:
        """End all connections. Without `goodbye` this rank has died, as far as the neighbours can tell."""
        self._leaving.set()
        for connection in self._connections:
            with suppress(OSError):
                if goodbye:
                    connection.sendall(_GOODBYE)
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it
            connection.close()

    def _watch(self, connection: socket.socket | None, rank: int) -> None:
        if connection is None:
            return
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            if hasattr(socket, option):  # they are Linux's names
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        _open.add(connection)
        self._connections.append(connection)

        def follow() -> None:
            said = b""
            with suppress(OSError):
                said = connection.recv(1)
            if not said and not self._leaving.is_set():
                self._lost(rank)

        threading.Thread(target=follow, name="medvlp-neighbour", daemon=True).start()


def _visit(address: str, port: int, token: bytes) -> socket.socket | None:
    with suppress(OSError):
        connection = socket.create_connection((address, port), timeout=_MEETING_SECONDS)
        connection.sendall(token)
        return connection
    return None


def _await(server: socket.socket, token: bytes) -> socket.socket | None:
    until = time.monotonic() + _MEETING_SECONDS
    with suppress(OSError):
        while (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            connection, _ = server.accept()
            connection.settimeout(left)
            if secrets.compare_digest(connection.recv(len(token)), token):
                return connection
            connection.close()
    return None

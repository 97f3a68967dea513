"""Notices at once that a neighbouring rank has died, whoever started it."""

import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

from medvlp import distributed
from medvlp.network import route_to
from medvlp.ranks import detect

logger = logging.getLogger(__name__)

_GOODBYE = b"."
#: Seconds to reach a neighbour. One that cannot be reached (a firewall) is not watched.
_MEETING_SECONDS = 10.0
#: Seconds in which a caller has to say who it is.
_CALLER_SECONDS = 2.0
#: Linux asks for a sign of the other machine after 60 s, every 30 s, and gives it up after eight without one:
#: a network that carries no gradients may be away for a while without harm.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 8))

_open: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def _close_copies() -> None:
    for connection in _open:
        connection.close()


# Else a data worker, which is a fork, would keep open what Linux closes when its rank dies.
os.register_at_fork(after_in_child=_close_copies)


class Neighbours:
    """A chain: each rank keeps a connection to the one before it, over which nothing is said but a goodbye.

    Linux ends the connections of a process that dies at once, and those of a machine that is gone within five
    minutes; a process that is only stopped keeps them. So it does not matter who started the ranks: torchrun
    ends those of its own node, srun none, and under NCCL all others would wait for a time-out.

    Args:
        lost: is told the rank of a neighbour that ended without a goodbye, in a thread.

    Attributes:
        run: a word that all ranks of this start know and no other start does; "" of a single rank.
    """

    def __init__(self, lost: Callable[[int], None]):
        self._lost = lost
        self._leaving = threading.Event()
        self._connections: list[socket.socket] = []
        self._machines: list[str] = []
        self.run = ""

    def meet(self) -> None:
        """Connect to the neighbours; a collective of all ranks. Who cannot be reached is not watched."""
        rank, ranks = distributed.rank(), distributed.world_size()
        if ranks == 1:
            return
        # Who calls without its first half is no neighbour, nor is who does not answer with the second.
        token = secrets.token_hex(32)
        with ExitStack() as stack:
            server, place = _serve() or (None, None)
            if server:
                stack.enter_context(server)
            told = distributed.gather_objects((socket.gethostname(), place, token))
            self._machines = [machine for machine, *_ in told]
            self.run = told[0][2]
            # At the same time: each rank is answered only by one that need not wait for its own answer.
            pool = stack.enter_context(ThreadPoolExecutor(1))
            caller = pool.submit(_await, server, token) if server and rank + 1 < ranks else None
            if rank > 0 and not self._watch(_visit(*told[rank - 1][1:]), rank - 1):
                logger.warning(
                    "%s is not watched from rank %d, which cannot reach it (a firewall?): where no launcher "
                    "says that it died, a time-out does",
                    self.name(rank - 1),
                    rank,
                )
            if caller:
                self._watch(caller.result(), rank + 1)

    def name(self, rank: int) -> str:
        """A rank and the machine it runs on."""
        return f"rank {rank} on {self._machines[rank]}"

    def leave(self, goodbye: bool) -> None:
        """Watch no more. Without `goodbye` the neighbours are told nothing before this process ends.

        Until then it may show the error that ends it; theirs, that it is gone, would take its place.
        """
        self._leaving.set()
        for connection in self._connections if goodbye else ():
            with suppress(OSError):
                connection.sendall(_GOODBYE)
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it
            connection.close()

    def _watch(self, connection: socket.socket | None, rank: int) -> bool:
        if connection is None:
            return False
        connection.settimeout(None)
        with suppress(OSError):
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
        return True


def _serve() -> tuple[socket.socket, tuple[str | None, int]] | None:
    """What the next rank can call, its address (None: that rank's for rank 0) and port; None: nothing."""
    ranks = detect()
    route = route_to(ranks.address)
    if not route.address:
        return None
    # To rank 0's own machine its name may be a loopback address; to others it is what they reach rank 0 by.
    elsewhere = route.is_loopback and ranks.world_size > ranks.local_world_size
    with suppress(OSError):
        if elsewhere:  # whose name there may be of the other family
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=16, dualstack_ipv6=both)
        else:
            family = socket.AF_INET6 if ":" in route.address else socket.AF_INET
            server = socket.create_server((route.address, 0), family=family, backlog=16)
        return server, (None if elsewhere else route.address, server.getsockname()[1])
    return None


def _visit(place: tuple[str | None, int] | None, token: str) -> socket.socket | None:
    """A connection to the rank that serves at `place`; None where it does not answer."""
    if place is None:
        return None
    with suppress(OSError):
        address, port = place
        connection = socket.create_connection((address or detect().address, port), timeout=_MEETING_SECONDS)
        hello, answer = _halves(token)
        connection.sendall(hello)
        # Longer than the other waits.
        said = _read(connection, len(answer), _MEETING_SECONDS + 2 * _CALLER_SECONDS)
        if secrets.compare_digest(said, answer):
            return connection
        with suppress(OSError):
            connection.sendall(_GOODBYE)  # its answer may be on the way, and then it watches
        connection.close()
    return None


def _await(server: socket.socket, token: str) -> socket.socket | None:
    """The connection of the first caller who knows `token`; None: there was none in time."""
    hello, answer = _halves(token)
    until = time.monotonic() + _MEETING_SECONDS
    with suppress(OSError):
        while (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(ConnectionError):  # a caller that has hung up
                connection, _ = server.accept()
                if secrets.compare_digest(_read(connection, len(hello), _CALLER_SECONDS), hello):
                    connection.sendall(answer)
                    return connection
                connection.close()
    return None


def _halves(token: str) -> tuple[bytes, bytes]:
    middle = len(token) // 2
    return token[:middle].encode(), token[middle:].encode()


def _read(connection: socket.socket, size: int, seconds: float) -> bytes:
    """The next `size` bytes, or what has come of them when the time or the connection ends."""
    until, said = time.monotonic() + seconds, b""
    with suppress(OSError):
        while len(said) < size and (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            more = connection.recv(size - len(said))
            if not more:
                break
            said += more
    return said

"""Who may stay: connections of each address, calls whose request does not come, and guesses of the token.

gRPC limits connections over all addresses only, so one address could hold them all. Its sockets are this
process's: a thread looks at them and shuts those that must go, which gRPC takes for a client that left.
"""

import ipaddress
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import psutil

from medvlp.serving.limits import Limits, RateLimit, peer_address

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


class Door:
    """Watches the connections to a port of this process.

    A connection is a stranger's until a call with the right token came over it. Strangers are sent away
    after `limits.handshake_seconds`, and the oldest of an address where it has more than `limits.strangers`;
    the newest of an address go where it has more than `limits.peer_connections` in all. Calls whose request
    is not there after `limits.message_seconds` are cancelled.

    Args:
        limits: of connections and guesses.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._guesses = RateLimit(limits.wrong_tokens_a_minute / 60, burst=limits.wrong_tokens)
        self._lock = threading.Lock()
        #: Peers that have shown the token -> when they did.
        self._known: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._reading: dict[grpc.ServicerContext, float] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, port: int) -> None:
        """Begin to look at the connections to a port."""
        self._thread = threading.Thread(target=self._watch, args=(port,), name="medvlp-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(10 * _LOOK_SECONDS)

    def admit(self, context: grpc.ServicerContext) -> None:
        """Let a call with the right token in; ends it where its address has guessed too often.

        The answer to a right token and to a wrong one is then the same, so nobody learns which it was. A
        connection that has shown the token before is not asked.
        """
        peer = context.peer()
        with self._lock:
            if peer in self._known:
                return
        self._refuse_guesser(context)
        with self._lock:
            self._known[peer] = time.monotonic()

    def refuse(self, context: grpc.ServicerContext, reason: str, guess: bool) -> None:
        """End a call without the right token."""
        self._refuse_guesser(context)
        if guess:
            self._guesses.allows(peer_address(context.peer()))
        context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)

    def _refuse_guesser(self, context: grpc.ServicerContext) -> None:
        if not self._guesses.allows(peer_address(context.peer()), cost=0):
            wait = math.ceil(60 / self.limits.wrong_tokens_a_minute)
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"too many wrong tokens from this address: no token is looked at before {wait} s without any",
            )

    @contextmanager
    def reading(self, context: grpc.ServicerContext) -> Iterator[None]:
        """While a thread waits for a request, see to it that it does not wait for ever."""
        with self._lock:
            self._reading[context] = time.monotonic() + self.limits.message_seconds
        try:
            yield
        finally:
            with self._lock:
                self._reading.pop(context, None)

    def _watch(self, port: int) -> None:
        process, problem = psutil.Process(), ""
        while not self._closing.wait(_LOOK_SECONDS):
            now = time.monotonic()
            with self._lock:
                late = [context for context, until in self._reading.items() if now > until]
            for context in late:
                context.cancel()  # type: ignore[no-untyped-call]
            try:
                self._send_away(process, port, now)
                problem = ""
            except (OSError, psutil.Error) as error:  # no file descriptor is free now, for one
                if str(error) != problem:
                    logger.warning("the connections to port %d cannot be looked at yet: %s", port, error)
                    problem = str(error)

    def _send_away(self, process: psutil.Process, port: int, now: float) -> None:
        found = {}
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port:
                found[_peer(*connection.raddr[:2])] = connection.fd
        for peer in self._to_close(list(found), now):
            _shut(found[peer], port, peer)

    def _to_close(self, peers: list[str], now: float) -> list[str]:
        """Which of the open connections must go; `now` is before they were looked at."""
        with self._lock:
            self._seen = {peer: self._seen.get(peer, now) for peer in peers}
            # A connection that came while they were looked at may be missing among them.
            self._known = {
                peer: since for peer, since in self._known.items() if peer in self._seen or since >= now
            }
            known = set(self._known)
        oldest_first = sorted(peers, key=self._seen.__getitem__)
        gone = [
            peer
            for peer in oldest_first
            if peer not in known and now - self._seen[peer] > self.limits.handshake_seconds
        ]
        for address in {peer_address(peer) for peer in peers}:
            own = [peer for peer in oldest_first if peer_address(peer) == address and peer not in gone]
            strangers = [peer for peer in own if peer not in known]
            gone += strangers[: max(0, len(strangers) - self.limits.strangers)]
            left = [peer for peer in own if peer not in gone]
            gone += left[self.limits.peer_connections :]
        return gone


def _peer(host: str, port: int) -> str:
    """What gRPC calls the other end."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    if isinstance(address, ipaddress.IPv4Address) or mapped is not None:
        return f"ipv4:{mapped or address}:{port}"
    return f"ipv6:%5B{host.replace('%', '%25')}%5D:{port}"


def _shut(descriptor: int, port: int, peer: str) -> None:
    """End a connection. By now its number may be another file's: so look again, at a copy that stays."""
    try:
        with socket.socket(fileno=socket.dup(descriptor)) as connection:
            if connection.getsockname()[1] == port and _peer(*connection.getpeername()[:2]) == peer:
                connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended by itself
        return

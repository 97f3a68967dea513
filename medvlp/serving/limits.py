"""What a request may cost: sizes, and requests a second of each peer."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

#: Peers whose rate is remembered; the longest unseen one is forgotten first.
_PEERS = 4096


@dataclass(frozen=True)
class Limits:
    """Largest sizes of requests; everything beyond is refused with RESOURCE_EXHAUSTED or INVALID_ARGUMENT.

    Attributes:
        message_bytes: of one request.
        rows: embeddings of one request. entries: clusters or samples answered for each of them.
        answers: rows x entries of one reply, which stays below the 4 MiB that gRPC clients take by default.
        texts: of one request. text_characters: of one text.
        images: of one request. image_bytes: of one file. image_pixels: of one decoded image.
        page: clusters of one reply.
        streams: calls at a time on one connection. calls: at a time over all connections.
        waiting: calls that may wait for the model, which does one at a time.
        connections: open ones. handshake_seconds: until a new one must speak gRPC.
        idle_seconds: until one without calls is closed.
        deadline_seconds: longest time a call may wait for the model.
        rate: requests a second of one address, on average over a second; 0: no limit.
    """

    message_bytes: int = 16 << 20
    rows: int = 4096
    entries: int = 100
    answers: int = 40_000
    texts: int = 64
    text_characters: int = 20_000
    images: int = 16
    image_bytes: int = 8 << 20
    image_pixels: int = 4096 * 4096
    page: int = 1000
    streams: int = 64
    calls: int = 64
    waiting: int = 8
    connections: int = 1024
    handshake_seconds: float = 10.0
    idle_seconds: float = 300.0
    deadline_seconds: float = 30.0
    rate: float = 10_000.0


class RateLimit:
    """A token bucket for each peer, which holds one second's worth; safe to share by threads.

    Args:
        rate: requests a second; 0: everything is allowed.
        clock: seconds that never go back.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, peer: str) -> bool:
        """Count a request of a peer; false where it comes too early."""
        if self._rate == 0:
            return True
        burst = max(1.0, self._rate)
        with self._lock:
            now = self._clock()
            tokens, last = self._buckets.get(peer, (burst, now))
            tokens = min(burst, tokens + (now - last) * self._rate)
            allowed = tokens >= 1
            self._buckets[peer] = (tokens - 1 if allowed else tokens, now)
            self._buckets.move_to_end(peer)
            if len(self._buckets) > _PEERS:
                self._buckets.popitem(last=False)
        return allowed


def peer_address(peer: str) -> str:
    """ "ipv4:10.0.0.7:41822" -> "ipv4:10.0.0.7": what gRPC calls a peer, without its port."""
    return peer.rsplit(":", 1)[0] if peer.startswith(("ipv4:", "ipv6:")) else peer

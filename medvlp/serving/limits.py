"""What a request may cost: sizes, and requests a second of each peer."""

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
        answers: rows x entries of one reply. reply_bytes: of one reply; gRPC's clients take 4 MiB by default.
        texts: of one request. text_characters: of one text.
        images: of one request. image_bytes: of one file. image_pixels: of one decoded image.
        page: clusters of one reply.
        streams: calls at a time on one connection. calls: at a time over all connections.
        waiting: calls that may wait for the model, which does one at a time.
        connections: open ones. peer_connections: of one address. strangers: of one address, over which no
            call with the token has come.
        handshake_seconds: until a new one must speak gRPC, and bring the token.
        idle_seconds: until one without calls is closed.
        message_seconds: until the request of a call must be there.
        wrong_tokens: of one address before no more are looked at. wrong_tokens_a_minute: after that.
        deadline_seconds: longest time a call may wait for the model.
        rate: requests a second of one address, on average over a second; 0: no limit.
    """

    message_bytes: int = 16 << 20
    rows: int = 4096
    entries: int = 100
    answers: int = 40_000
    reply_bytes: int = 4_000_000
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
    peer_connections: int = 256
    strangers: int = 32
    handshake_seconds: float = 10.0
    idle_seconds: float = 300.0
    message_seconds: float = 30.0
    wrong_tokens: int = 10
    wrong_tokens_a_minute: float = 6.0
    deadline_seconds: float = 30.0
    rate: float = 10_000.0


class RateLimit:
    """A token bucket for each peer; safe to share by threads.

    Args:
        rate: requests a second; 0: everything is allowed.
        clock: seconds that never go back.
        burst: what a bucket holds; default: one second's worth.
    """

    def __init__(
        self, rate: float, clock: Callable[[], float] = time.monotonic, burst: float | None = None
    ) -> None:
        self._rate, self._clock = rate, clock
        self._burst = max(1.0, rate) if burst is None else burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, peer: str, cost: float = 1.0) -> bool:
        """Count a request of a peer (with `cost` 0 only look); false where it comes too early."""
        if self._rate == 0:
            return True
        burst = self._burst
        with self._lock:
            now = self._clock()
            tokens, last = self._buckets.get(peer, (burst, now))
            tokens = min(burst, tokens + (now - last) * self._rate)
            allowed = tokens >= 1
            self._buckets[peer] = (tokens - cost if allowed else tokens, now)
            self._buckets.move_to_end(peer)
            if len(self._buckets) > _PEERS:
                self._buckets.popitem(last=False)
        return allowed


def peer_address(peer: str) -> str:
    """ "ipv4:10.0.0.7:41822" -> "ipv4:10.0.0.7": what gRPC calls a peer, without its port."""
    return peer.rsplit(":", 1)[0] if peer.startswith(("ipv4:", "ipv6:")) else peer

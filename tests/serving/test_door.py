"""Connections that are held, requests that do not come, and tokens that are guessed, over real sockets."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import grpc
import numpy as np
import psutil
import pytest

from medvlp.serving.access import metadata
from medvlp.serving.door import Door
from medvlp.serving.limits import Limits
from medvlp.serving.server import Address, PrototypeServer
from medvlp.serving.servicer import SERVICE
from medvlp.serving.wire import prototypes_pb2 as wire
from shards.errors import UsageError
from tests.serving.conftest import TOKEN, is_closed

Start = Callable[..., PrototypeServer]
Code = grpc.StatusCode
#: What a client of HTTP/2 sends first: the preface and an empty SETTINGS frame.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
ROWS = np.ones((2, 16), "<f4")
REQUEST = wire.NearestRequest(embeddings=ROWS.tobytes(), rows=2).SerializeToString()


def ask(channel: grpc.Channel, token: str = TOKEN, **options: object) -> tuple[Code, str]:
    unary = channel.unary_unary(f"/{SERVICE.full_name}/Nearest")
    try:
        unary(REQUEST, metadata=metadata(token), timeout=20, **options)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return Code.OK, ""


def ask_once(server: PrototypeServer, token: str = TOKEN, host: str = "127.0.0.1") -> tuple[Code, str]:
    """Over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"{host}:{server.port}", options) as channel:
        return ask(channel, token, wait_for_ready=True)


@contextlib.contextmanager
def holding(server: PrototypeServer, count: int, hello: bytes) -> Iterator[list[socket.socket]]:
    connections = []
    try:
        for _ in range(count):
            connections.append(socket.create_connection(("127.0.0.1", server.port), 10))
            with contextlib.suppress(OSError):
                connections[-1].sendall(hello)
        yield connections
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("hello", [b"", HELLO, HELLO + b"\0\0"], ids=["silent", "idle", "half a frame"])
def test_held_connections_keep_nobody_out(start: Start, hello: bytes) -> None:
    server = start(Limits(connections=40, strangers=8, handshake_seconds=4))
    with holding(server, 40, hello) as connections:
        started = time.monotonic()
        assert ask_once(server)[0] is Code.OK
        assert time.monotonic() - started < 15
        assert all(is_closed(connection, 15) for connection in connections), "strangers must go in time"


def test_whoever_comes_again_and_again_keeps_nobody_out_either(start: Start) -> None:
    server = start(Limits(connections=40, strangers=8, handshake_seconds=4))
    end = threading.Event()

    def come_again() -> None:
        while not end.is_set():
            with contextlib.suppress(OSError), holding(server, 10, HELLO) as connections:
                is_closed(connections[-1], 2)

    threads = [threading.Thread(target=come_again) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert ask_once(server)[0] is Code.OK
    finally:
        end.set()
        for thread in threads:
            thread.join(60)


def test_one_address_cannot_hold_all_connections_with_the_token_either(start: Start) -> None:
    server = start(Limits(peer_connections=6))
    options = [("grpc.use_local_subchannel_pool", 1)]
    with contextlib.ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.port}", options)) for _ in range(12)
        ]
        for channel in channels:
            ask(channel)
        time.sleep(2)
        assert len(server._door._known) <= 6


def test_a_known_connection_may_rest(start: Start) -> None:
    server = start(Limits(handshake_seconds=1))
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert ask(channel)[0] is Code.OK
        states: list[grpc.ChannelConnectivity] = []
        channel.subscribe(states.append)
        time.sleep(3)
        assert grpc.ChannelConnectivity.IDLE not in states[1:]
        assert ask(channel)[0] is Code.OK


def test_requests_that_do_not_come_give_their_threads_back(start: Start) -> None:
    server = start(Limits(message_seconds=2))
    release = threading.Event()

    def never() -> Iterator[bytes]:
        release.wait(60)
        yield REQUEST

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        method = channel.stream_stream(f"/{SERVICE.full_name}/Nearest")
        slow = [method(never(), metadata=metadata(TOKEN), timeout=60) for _ in range(16)]  # all threads
        time.sleep(0.5)
        started = time.monotonic()
        assert ask_once(server)[0] is Code.OK
        assert time.monotonic() - started < 20
        for call in slow:
            with pytest.raises(grpc.RpcError) as ended:
                next(call)
            assert ended.value.code() is Code.CANCELLED
        release.set()


def test_wrong_tokens_are_slowed_down_and_tell_nothing(start: Start) -> None:
    server = start(Limits(wrong_tokens=3, wrong_tokens_a_minute=20))
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as known:
        assert ask(known)[0] is Code.OK
        found = [ask_once(server, "a wrong token that is long enough") for _ in range(5)]
        assert [code for code, _ in found] == [Code.UNAUTHENTICATED] * 3 + [Code.RESOURCE_EXHAUSTED] * 2
        assert "too many wrong tokens from this address: no token is looked at before 3 s" in found[-1][1]
        assert ask_once(server) == found[-1], "right or wrong: the answer is the same"
        unknown = known.unary_unary(f"/{SERVICE.full_name}/Unknown")
        with pytest.raises(grpc.RpcError) as missing:
            unknown(b"", metadata=metadata(TOKEN))
        assert missing.value.code() is Code.UNIMPLEMENTED
        assert ask(known)[0] is Code.OK
        time.sleep(3.5)
        assert ask_once(server)[0] is Code.OK


@pytest.mark.skipif(not socket.has_ipv6, reason="needs a second address")
def test_other_addresses_are_not_slowed_down(start: Start) -> None:
    server = start(Limits(wrong_tokens=1, wrong_tokens_a_minute=1), Address(host="::"))
    try:
        socket.create_connection(("::1", server.port), 5).close()
    except OSError:
        pytest.skip("needs ::1")
    for _ in range(3):
        code, _ = ask_once(server, "a wrong token that is long enough")
    assert code is Code.RESOURCE_EXHAUSTED
    assert ask_once(server, host="[::1]")[0] is Code.OK


@pytest.mark.skipif(not socket.has_ipv6, reason="needs a second address")
def test_strangers_are_sent_away_on_every_kind_of_address(start: Start) -> None:
    server = start(Limits(handshake_seconds=1), Address(host="::"))
    for host in ("127.0.0.1", "::1"):
        try:
            connection = socket.create_connection((host, server.port), 5)
        except OSError:
            pytest.skip(f"needs {host}")
        with connection:
            connection.sendall(HELLO)
            assert is_closed(connection, 15)
        with_token = "[::1]" if ":" in host else host
        with grpc.insecure_channel(f"{with_token}:{server.port}") as channel:
            assert ask(channel)[0] is Code.OK
            time.sleep(2.5)
            assert ask(channel)[0] is Code.OK
            assert len(server._door._known) == 1
        time.sleep(1)


def test_strangers_go_also_after_a_look_that_failed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    look, failures = psutil.Process.net_connections, [OSError(errno.EMFILE, "too many open files")]

    def fail_once(process: psutil.Process, kind: str) -> object:
        if failures:
            raise failures.pop()
        return look(process, kind)

    monkeypatch.setattr(psutil.Process, "net_connections", fail_once)
    server = start(Limits(handshake_seconds=1))
    with holding(server, 1, HELLO) as (stranger,):
        assert is_closed(stranger, 20)
    assert not failures


def test_as_many_files_may_be_opened_as_connections_need(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: allowed.append(pair))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    start(Limits(connections=1024))
    assert allowed == [(1536, 4096)]
    with pytest.raises(UsageError, match="needs 4512 open files, and this process may open 4096"):
        start(Limits(connections=4000))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (4096, 4096))
    start(Limits(connections=1024))
    assert len(allowed) == 1


def test_who_is_admitted_during_a_look_is_not_forgotten() -> None:
    door, peer = Door(Limits()), "ipv4:127.0.0.1:41822"
    now = time.monotonic()
    door.admit(Mock(peer=lambda: peer))
    assert door._to_close([], now) == [], "it came too late to be seen"
    assert door._to_close([peer], now + 0.5) == []
    assert door._to_close([peer], now + 11) == []
    assert door._to_close([], now + 12) == []
    assert not door._known, "it has gone"

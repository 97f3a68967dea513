"""What the server does with strangers, nonsense and too much: a status with a sentence, and it goes on."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from medvlp.serving.access import check_network, make_token, metadata, read_token
from medvlp.serving.answers import Answers
from medvlp.serving.client import Connection, PrototypeClient, RemoteError
from medvlp.serving.layout import PrototypeFilesError
from medvlp.serving.limits import Limits, RateLimit, peer_address
from medvlp.serving.server import STREAMS, Address, PrototypeServer
from medvlp.serving.servicer import SERVICE
from medvlp.serving.snapshot import Snapshot
from medvlp.serving.wire import prototypes_pb2 as wire
from shards.errors import UsageError
from tests.serving.conftest import TOKEN, is_closed

#: Bound of what is waited for, reached by nothing but a fault: machines may be busy.
PATIENCE = 200
METHODS = [method.name for method in SERVICE.methods]
Code = grpc.StatusCode


def call(server: PrototypeServer, method: str, data: bytes, given_metadata=None) -> tuple[Code, str]:
    """The status of a call with any bytes."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        unary = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
        try:
            unary(
                data, metadata=metadata(TOKEN) if given_metadata is None else given_metadata, timeout=PATIENCE
            )
        except grpc.RpcError as error:
            return error.code(), error.details()
    return Code.OK, ""


@pytest.mark.parametrize("method", [*METHODS, "Unknown"])
def test_nobody_gets_in_without_the_token(method: str, start: Callable[..., PrototypeServer]) -> None:
    server = start()
    for given_metadata, told in (
        ([], "no token"),
        (metadata(TOKEN[:-1]), "wrong token"),
        (metadata(TOKEN + "x"), "wrong token"),
        ([("authorization", TOKEN)], "wrong token"),
        ([("authorization-bin", b"\xff" * 9)], "no token"),
    ):
        code, details = call(server, method, b"", given_metadata)
        assert code is Code.UNAUTHENTICATED
        assert told in details
        assert "authorization: Bearer" in details
        assert TOKEN not in details


def request(values: np.ndarray, **changes: object) -> bytes:
    fields = {"embeddings": values.astype("<f4").tobytes(), "rows": len(values)} | changes
    return wire.NearestRequest(**fields).SerializeToString()


ROWS = np.ones((2, 16), np.float32)
BAD = {
    "wrong width": ("Nearest", request(np.ones((2, 15))), "have 16 numbers"),
    "no rows": ("Nearest", request(np.ones((0, 16))), "send 1 to"),
    "rows that are not there": ("Nearest", request(ROWS, rows=2**32 - 1), "send 1 to"),
    "too many rows": ("Nearest", request(np.ones((5000, 16))), "send 1 to 4096"),
    "half the bytes": ("Nearest", request(ROWS, format=wire.FLOAT16), "of 2 bytes"),
    "unknown format": ("Nearest", request(ROWS, format=7), "neither FLOAT32 nor"),
    "NaN": ("Nearest", request(np.full((2, 16), np.nan)), "row 0 is zero or not finite"),
    "infinite": ("Nearest", request(np.concatenate([ROWS, ROWS * np.inf])), "row 2 is"),
    "zero": ("Nearest", request(ROWS * 0), "row 0 is zero"),
    "too many answers": ("Nearest", request(ROWS, wanted=wire.Wanted(samples=101)), "at most 100"),
    "too large a reply": (
        "Nearest", request(np.ones((4096, 16)), wanted=wire.Wanted(clusters=11)), "more than 40000 answers",
    ),
    "unknown modality": ("Nearest", request(ROWS, wanted=wire.Wanted(samples=1, of=9)), "of: IMAGE"),
    "no text": ("NearestText", b"", "send 1 to 64"),
    "empty text": ("NearestText", wire.NearestTextRequest(texts=[" "]).SerializeToString(), "no words"),
    "long text": (
        "NearestText", wire.NearestTextRequest(texts=["a" * 20_001]).SerializeToString(), "at most 20000",
    ),
    "no image": ("NearestImage", wire.NearestImageRequest(images=[b""]).SerializeToString(), "is empty"),
    "no film": ("NearestImage", wire.NearestImageRequest(images=[b"GIF89a"]).SerializeToString(), "not a"),
    "too many images": (
        "NearestImage", wire.NearestImageRequest(images=[b"x"] * 17).SerializeToString(), "send 1 to 16",
    ),
    "malformed": ("Nearest", b"\x0a\xff\xff\xff\xff\x0f", "use the messages of prototypes.proto"),
    "not UTF-8": ("NearestText", b"\x0a\x02\xff\xfe", "use the messages of prototypes.proto"),
}  # fmt: skip


def test_every_bad_request_is_refused_with_a_remedy(start: Callable[..., PrototypeServer]) -> None:
    server = start()
    for name, (method, data, told) in BAD.items():
        code, details = call(server, method, data)
        assert code is Code.INVALID_ARGUMENT, (name, details)
        assert told in details, name
    assert call(server, "Cluster", wire.ClusterRequest(id=8).SerializeToString())[0] is Code.NOT_FOUND
    assert call(server, "Nearest", request(ROWS))[0] is Code.OK


@pytest.mark.filterwarnings("error")
def test_bombs_are_refused_before_they_are_decoded(start: Callable[..., PrototypeServer]) -> None:
    server = start()
    bombs = []
    for file_format in ("PNG", "JPEG", "TIFF"):
        stream = io.BytesIO()
        options = {"compression": "tiff_deflate"} if file_format == "TIFF" else {}
        Image.new("L", (5000, 4000)).save(stream, file_format, **options)
        bombs.append(stream.getvalue())
    for bomb in bombs:
        data = wire.NearestImageRequest(images=[bomb]).SerializeToString()
        code, details = call(server, "NearestImage", data)
        assert code is Code.INVALID_ARGUMENT
        assert "5000 x 4000 pixels is larger than the limit" in details
    data = wire.NearestImageRequest(images=[b"x" * ((8 << 20) + 1)]).SerializeToString()
    assert "send at most 8388608" in call(server, "NearestImage", data)[1]


def test_an_oversized_message_is_refused(start: Callable[..., PrototypeServer]) -> None:
    server = start(Limits(message_bytes=100_000))
    code, details = call(server, "Nearest", b"\0" * 200_000)
    assert code is Code.RESOURCE_EXHAUSTED
    assert "larger than max" in details
    assert call(server, "Nearest", request(ROWS))[0] is Code.OK


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(METHODS), st.binary(max_size=200))
@example("Nearest", b"")
@example("Clusters", b"\x08\xff\xff\xff\xff\x0f")
def test_any_bytes_get_a_proper_status(
    start: Callable[..., PrototypeServer], method: str, data: bytes
) -> None:
    if not hasattr(start, "server"):
        start.server = start()  # one for all examples
    assert call(start.server, method, data)[0] in (Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND)


def test_a_peer_that_asks_too_often_is_told_to_wait(start: Callable[..., PrototypeServer]) -> None:
    server = start(Limits(rate=0.001))
    with PrototypeClient(Connection(f"127.0.0.1:{server.port}", TOKEN)) as client:
        assert client.table().clusters == 8
        with pytest.raises(RemoteError, match=r"RESOURCE_EXHAUSTED.*more than 0.001 requests a second"):
            client.table()


def test_the_rate_is_that_of_each_address() -> None:
    now = [0.0]
    limit = RateLimit(2, lambda: now[0])
    peers = [peer_address(peer) for peer in ("ipv4:10.0.0.7:1", "ipv4:10.0.0.7:2", "ipv6:%5B::1%5D:3")]
    assert peers[0] == peers[1] != peers[2]
    assert [limit.allows(peers[0]) for _ in range(3)] == [True, True, False]
    assert limit.allows(peers[2])
    now[0] = 0.5
    assert [limit.allows(peers[0]) for _ in range(2)] == [True, False]
    for number in range(10_000):
        limit.allows(str(number))
    assert len(limit._buckets) <= 4096
    assert all(RateLimit(0).allows("x") for _ in range(10))


class StuckModel:
    """Takes until it is told to end."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        self.entered.set()
        assert self.leave.wait(PATIENCE)
        return torch.nn.functional.normalize(torch.ones(len(texts), 16), dim=1)


TEXT = wire.NearestTextRequest(texts=["x"]).SerializeToString()


@pytest.fixture
def stuck(snapshot: Snapshot) -> Iterator[StuckModel]:
    model = StuckModel()
    yield model
    model.leave.set()


def ask(server: PrototypeServer, found: list[tuple[Code, str]]) -> threading.Thread:
    """Ask in another thread; the status comes into `found`."""
    asking = threading.Thread(target=lambda: found.append(call(server, "NearestText", TEXT)))
    asking.start()
    return asking


def test_the_queue_for_the_model_is_short(
    start: Callable[..., PrototypeServer], snapshot: Snapshot, stuck: StuckModel
) -> None:
    limits = Limits(waiting=2, deadline_seconds=PATIENCE)
    server = start(limits)
    server.publish(Answers(snapshot, lambda: stuck, limits))
    found: list[tuple[Code, str]] = []
    asking = [ask(server, found)]
    assert stuck.entered.wait(PATIENCE)
    asking.append(ask(server, found))
    while server.servicer._waiting._value:
        time.sleep(0.01)
    code, details = call(server, "NearestText", TEXT)
    assert code is Code.RESOURCE_EXHAUSTED
    assert "2 requests for the model are waiting" in details
    assert call(server, "Nearest", request(ROWS))[0] is Code.OK, "others need no model"
    stuck.leave.set()
    for thread in asking:
        thread.join(PATIENCE)
    assert [code for code, _ in found] == [Code.OK, Code.OK]


def test_the_wait_for_the_model_ends_in_time(
    start: Callable[..., PrototypeServer], snapshot: Snapshot, stuck: StuckModel
) -> None:
    limits = Limits(deadline_seconds=0.5)
    server = start(limits)
    server.publish(Answers(snapshot, lambda: stuck, limits))
    found: list[tuple[Code, str]] = []
    first = ask(server, found)
    assert stuck.entered.wait(PATIENCE)
    code, details = call(server, "NearestText", TEXT)
    assert code is Code.DEADLINE_EXCEEDED
    assert "the model was busy" in details, "it was the server, not the client, that gave up"
    stuck.leave.set()
    first.join(PATIENCE)
    assert call(server, "NearestText", TEXT)[0] is Code.OK


def test_open_streams_leave_threads_for_others(start: Callable[..., PrototypeServer]) -> None:
    server = start()
    leave = threading.Event()

    def silent() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        leave.wait()

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        def stream(requests: Iterator[reflection_pb2.ServerReflectionRequest]) -> Any:
            return stub.ServerReflectionInfo(requests, metadata=metadata(TOKEN))

        try:
            # Each has answered, and so holds its thread, before the next one is opened.
            streams = [stream(silent()) for _ in range(STREAMS)]
            assert all(next(found).HasField("list_services_response") for found in streams)
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as refused:
                    next(stream(silent()))
                assert refused.value.code() is Code.RESOURCE_EXHAUSTED
                assert "too many streams are open" in refused.value.details()
            assert call(server, "Nearest", request(ROWS))[0] is Code.OK
        finally:
            leave.set()
        # Streams that have ended make room, all of them.
        for found in streams:
            assert list(found) == []
        again = [stream(iter([reflection_pb2.ServerReflectionRequest(list_services="")])) for _ in range(3)]
        assert [len(list(found)) for found in again] == [1, 1, 1]


def test_watchers_of_health_leave_threads_for_others(start: Callable[..., PrototypeServer]) -> None:
    server = start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def watch() -> Any:
            return stub.Watch(health_pb2.HealthCheckRequest(), metadata=metadata(TOKEN), timeout=PATIENCE)

        watches = [watch() for _ in range(STREAMS)]
        assert all(next(found).status == health_pb2.HealthCheckResponse.SERVING for found in watches)
        surplus = [watch() for _ in range(16)]  # as many as there are threads
        with PrototypeClient(Connection(f"127.0.0.1:{server.port}", TOKEN), timeout=20) as client:
            assert client.table().clusters == 8
        for found in surplus:
            with pytest.raises(grpc.RpcError) as refused:
                next(found)
            assert refused.value.code() is Code.RESOURCE_EXHAUSTED
        for found in watches:
            found.cancel()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(grpc.RpcError):
                assert next(watch()).status == health_pb2.HealthCheckResponse.SERVING
                break
        else:
            pytest.fail("watchers that have gone make no room")


def test_connections_are_bounded(start: Callable[..., PrototypeServer]) -> None:
    server = start(Limits(connections=5, handshake_seconds=10 * PATIENCE))
    idle = [socket.create_connection(("127.0.0.1", server.port), PATIENCE) for _ in range(20)]
    deadline = time.monotonic() + PATIENCE
    while sum(is_closed(connection, 0.01) for connection in idle) < 15:
        assert time.monotonic() < deadline, "less than 15 of 20 were refused"
    assert sum(is_closed(connection, 0.2) for connection in idle) == 15
    for connection in idle:
        connection.close()


def test_who_says_nothing_in_time_is_sent_away(start: Callable[..., PrototypeServer]) -> None:
    server = start(Limits(connections=5, handshake_seconds=1))
    idle = [socket.create_connection(("127.0.0.1", server.port), PATIENCE) for _ in range(5)]
    assert all(is_closed(connection, PATIENCE) for connection in idle)
    assert call(server, "Nearest", request(ROWS))[0] is Code.OK
    for connection in idle:
        connection.close()


def test_tls_needs_its_certificate(start: Callable[..., PrototypeServer], tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    server = start(address=Address(tls_certificate=certificate, tls_key=key))
    where = f"localhost:{server.port}"
    with PrototypeClient(Connection(where, TOKEN, certificate)) as client:
        assert client.table().clusters == 8
    with PrototypeClient(Connection(where, TOKEN), timeout=3) as client, pytest.raises(RemoteError):
        client.table()
    with pytest.raises(UsageError, match="both --tls-cert and --tls-key"):
        start(address=Address(tls_key=key))
    key.write_text("no key")
    with pytest.raises(UsageError):
        start(address=Address(tls_certificate=certificate, tls_key=key))


def test_other_machines_need_tls_or_a_word() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_network(host, tls=False, insecure_network=False)
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        with pytest.raises(UsageError, match="--insecure-network"):
            check_network(host, tls=False, insecure_network=False)
        check_network(host, tls=True, insecure_network=False)
        check_network(host, tls=False, insecure_network=True)
    with pytest.raises(UsageError, match="address of this machine"):
        check_network("no such host", tls=True, insecure_network=True)


def test_tokens_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "prototypes" / "token"
    before = os.umask(0)
    try:
        token = make_token(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) >= 32
    assert make_token(path) == read_token(path) == token
    assert make_token(tmp_path / "other") != token
    path.chmod(0o640)
    with pytest.raises(PrototypeFilesError, match="chmod 600"):
        make_token(path)
    path.chmod(0o600)
    for content in ("", "short", "two words that are long enough", "ключ-длинный-достаточно"):
        path.write_text(content)
        with pytest.raises(PrototypeFilesError):
            read_token(path)
    with pytest.raises(PrototypeFilesError):
        read_token(tmp_path / "missing")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PrototypeFilesError):
        make_token(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()

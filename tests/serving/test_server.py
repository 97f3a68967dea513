"""The server and its client: every answer is that of the stored prototypes and the run's method."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from medvlp.serving.access import metadata
from medvlp.serving.answers import Answers
from medvlp.serving.client import Connection, PrototypeClient, RemoteError, connection_of
from medvlp.serving.cluster_report import Members
from medvlp.serving.layout import ADDRESS, folder_of
from medvlp.serving.layout import TOKEN as TOKEN_FILE
from medvlp.serving.limits import Limits
from medvlp.serving.offline import RunFiles
from medvlp.serving.run_model import RunModel
from medvlp.serving.server import Address, PrototypeServer
from medvlp.serving.servicer import SERVICE
from medvlp.serving.snapshot import Snapshot, pack_keys
from shards.errors import UsageError
from shards.reader import ShardReader
from tests.serving.conftest import TOKEN


def channel(server: PrototypeServer) -> grpc.Channel:
    return grpc.insecure_channel(f"127.0.0.1:{server.port}")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nearest_is_the_product_with_the_centroids(
    dtype: type, client: PrototypeClient, snapshot: Snapshot
) -> None:
    rows = 3.0 * np.random.default_rng(0).normal(size=(5, 16)).astype(dtype)
    reply = client.nearest(rows, clusters=3, samples=2)
    unit = torch.nn.functional.normalize(torch.from_numpy(rows).float(), dim=1)
    cosines, ids = snapshot.table.nearest(unit, 3)
    assert reply.rows == 5
    assert list(reply.clusters) == ids.flatten().tolist()
    np.testing.assert_allclose(reply.cosines, cosines.flatten(), atol=1e-5)
    images = torch.nn.functional.normalize(snapshot.image.float(), dim=1)
    best, places = (unit @ images.T).topk(2, dim=1)
    np.testing.assert_allclose(reply.sample_cosines, best.flatten(), atol=1e-5)
    assert list(reply.sample_positions) == snapshot.sample[places.flatten()].tolist()
    assert list(reply.sample_keys) == [snapshot.key_of(row) for row in places.flatten().tolist()]
    assert (reply.version, reply.fingerprint) == (snapshot.table.version, snapshot.table.fingerprint)


@pytest.mark.parametrize("scale", [1e-40, 3e37])
def test_the_length_of_a_row_does_not_matter(scale: float, client: PrototypeClient) -> None:
    rows = np.random.default_rng(0).uniform(0.5, 1, size=(3, 16))
    short, unit = client.nearest(scale * rows), client.nearest(rows)
    assert list(short.clusters) == list(unit.clusters)
    np.testing.assert_allclose(short.cosines, unit.cosines, atol=1e-3)


def test_many_rows_and_the_samples_by_their_reports(client: PrototypeClient, snapshot: Snapshot) -> None:
    rows = snapshot.report.numpy()
    reply = client.nearest(np.tile(rows, (6, 1)), samples=1, of="report")
    assert len(reply.clusters) == len(reply.sample_keys) == 6 * len(rows)
    np.testing.assert_allclose(reply.sample_cosines, 1, atol=1e-3)
    everything = client.nearest(rows[:1], clusters=100, samples=100)
    assert sorted(everything.clusters) == list(range(8))
    assert sorted(everything.sample_positions) == sorted(snapshot.sample.tolist())


def test_texts_and_images_are_embedded_by_the_runs_method(
    client: PrototypeClient, snapshot: Snapshot, model: RunModel, data: Path
) -> None:
    texts = ["Small left pleural effusion. No pneumothorax.", "Clear lungs."]
    by_text = client.nearest_text(texts, clusters=2)
    expected = client.nearest(model.embed_texts(texts).numpy(), clusters=2)
    assert list(by_text.clusters) == list(expected.clusters)
    np.testing.assert_allclose(by_text.cosines, expected.cosines, atol=1e-5)
    files = [ShardReader(data).image("train", int(snapshot.sample[row])) for row in (0, 5)]
    by_image = client.nearest_image(files, samples=1)
    np.testing.assert_allclose(by_image.sample_cosines, 1, atol=1e-3)
    assert list(by_image.sample_positions) == snapshot.sample[[0, 5]].tolist() != [0, 5]


def test_clusters_come_in_pages_and_one_by_one(
    start: Callable[..., PrototypeServer], snapshot: Snapshot
) -> None:
    members = Members.of(snapshot)
    server = start(Limits(page=3))
    with PrototypeClient(Connection(f"127.0.0.1:{server.port}", TOKEN)) as client:
        page = client.clusters(first=2, count=1000)
        assert [cluster.id for cluster in page.clusters] == [2, 3, 4]
        assert page.total == 8
        found = list(client.all_clusters())
        assert [cluster.images for cluster in found] == members.images.tolist()
        assert [cluster.reports for cluster in found] == members.reports.tolist()
        largest = int(members.images.argmax())
        detail = client.cluster(largest)
        assert detail.cluster == found[largest]
        assert detail.cluster.purity == pytest.approx(members.purity(largest))
        mix = {label.name: pytest.approx(label.share) for label in detail.cluster.labels}
        assert mix == members.label_mix(largest)
        assert detail.typical[0].key == snapshot.key_of(int(members.rows(largest)[0]))
        empty = np.flatnonzero(members.images + members.reports == 0)
        for number in empty.tolist():
            assert found[number].similarity is None
        table = client.table()
        assert (table.clusters, table.width, table.step) == (8, 16, 3)
        assert list(table.label_names) == snapshot.origin.label_names


def test_replies_fit_what_clients_take(
    start: Callable[..., PrototypeServer], snapshot: Snapshot, model: RunModel
) -> None:
    """gRPC's clients refuse more than 4 MiB, with a word about no limit of ours."""
    long = replace(
        snapshot, keys=pack_keys([f"{row:02d}" + 3000 * "k" for row in range(len(snapshot.sample))])
    )
    server, rows = start(), np.random.default_rng(0).normal(size=(200, 16))
    server.publish(Answers(long, lambda: model))
    with PrototypeClient(Connection(f"127.0.0.1:{server.port}", TOKEN), timeout=200) as client:
        with pytest.raises(RemoteError, match=r"INVALID_ARGUMENT\): .*send fewer rows at a time"):
            client.nearest(rows, samples=10)
        assert len(client.nearest(rows[:100], samples=10).sample_keys) == 1000
        server.publish(Answers(snapshot, lambda: model, Limits(reply_bytes=1000)))
        assert len(client.clusters().clusters) < 8
        assert [cluster.id for cluster in client.all_clusters()] == [*range(8)]


def test_files_answer_as_the_server_does(client: PrototypeClient, built: Path) -> None:
    with RunFiles(built, "cpu") as files:
        rows = np.random.default_rng(1).normal(size=(2, 16))
        assert files.nearest(rows, 2, 2) == client.nearest(rows, 2, 2)
        assert files.nearest_text(["No effusion."]) == client.nearest_text(["No effusion."])
        assert list(files.all_clusters()) == list(client.all_clusters())
        assert files.cluster(1) == client.cluster(1)
        assert files.table() == client.table()


def test_health_and_reflection_are_the_standard_ones(start: Callable[..., PrototypeServer]) -> None:
    server = start(ready=False)
    with channel(server) as open_channel:
        health = health_pb2_grpc.HealthStub(open_channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE.full_name)
        status = health_pb2.HealthCheckResponse
        assert health.Check(request, metadata=metadata(TOKEN)).status == status.NOT_SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(open_channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([question]), metadata=metadata(TOKEN))
        assert SERVICE.full_name in {found.name for found in answer.list_services_response.service}
        with pytest.raises(grpc.RpcError) as refused:
            health.Check(request)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_before_the_first_checkpoint_and_after_a_new_one(
    start: Callable[..., PrototypeServer], snapshot: Snapshot, model: RunModel
) -> None:
    server = start(ready=False)
    with PrototypeClient(Connection(f"127.0.0.1:{server.port}", TOKEN)) as client:
        with pytest.raises(RemoteError, match=r"UNAVAILABLE.*no checkpoint yet"):
            client.table()
        versions = set()
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                try:
                    reply = client.nearest(np.ones((1, 16)))
                except RemoteError:
                    versions.add("")
                else:
                    versions.add(reply.fingerprint)

        asking = threading.Thread(target=ask)
        asking.start()
        server.publish(Answers(snapshot, lambda: model))
        deadline = time.monotonic() + 200
        while snapshot.table.fingerprint not in versions and time.monotonic() < deadline:
            time.sleep(0.01)
        stop.set()
        asking.join()
        assert versions - {""} == {snapshot.table.fingerprint}


def test_calls_in_flight_end_before_the_server_does(
    start: Callable[..., PrototypeServer], snapshot: Snapshot
) -> None:
    entered, leave = threading.Event(), threading.Event()

    class SlowModel:
        def embed_texts(self, texts: list[str]) -> torch.Tensor:
            entered.set()
            assert leave.wait(200)
            return torch.nn.functional.normalize(torch.ones(len(texts), 16), dim=1)

    server = start()
    server.publish(Answers(snapshot, SlowModel))
    with PrototypeClient(Connection(f"127.0.0.1:{server.port}", TOKEN)) as client:
        found = []
        asking = threading.Thread(target=lambda: found.append(client.nearest_text(["x"])))
        asking.start()
        assert entered.wait(200)
        stopping = threading.Thread(target=server.stop, args=(200,))
        stopping.start()
        leave.set()
        stopping.join(200)
        asking.join(200)
        assert found[0].rows == 1
        with pytest.raises(RemoteError, match="no server answers"):
            client.table()


def test_a_port_in_use_is_refused(start: Callable[..., PrototypeServer]) -> None:
    port = start().port
    with pytest.raises(UsageError, match="give another --host or --port"):
        start(address=Address(port=port))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"host": "another-node"}, "listens on the loopback of another-node alone"),
        ({"pid": 1}, "is no more, or is another user's"),
        ({"address": "127.0.0.1:1"}, "is no more, or is another user's"),
    ],
    ids=["another machine", "another process", "another port"],
)
def test_only_the_server_that_a_run_names_is_asked_on_loopback(
    start: Callable[..., PrototypeServer],
    tmp_path: Path,
    changed: dict[str, object],
    told: str,
) -> None:
    """Whoever else listens there would get the token."""
    server, folder = start(), folder_of(tmp_path)
    server.describe(folder, tmp_path)
    (folder / TOKEN_FILE).write_text(TOKEN)
    (folder / TOKEN_FILE).chmod(0o600)
    with PrototypeClient(connection_of(tmp_path), timeout=20) as client:
        assert client.table().clusters == 8
    content = json.loads((folder / ADDRESS).read_text())
    (folder / ADDRESS).write_text(json.dumps(content | changed))
    with pytest.raises(RemoteError, match=told):
        connection_of(tmp_path)


@pytest.mark.parametrize("address", ["192.0.2.1:7443", "gpu7:7443", "[2001:db8::1]:7443", "dns:///gpu7:7443"])
def test_no_client_goes_to_another_machine_without_tls(address: str) -> None:
    with pytest.raises(UsageError, match="--tls-ca"):
        PrototypeClient(Connection(address, TOKEN))
    PrototypeClient(Connection(address, TOKEN, insecure_network=True)).close()


@pytest.mark.parametrize("content", [b"[1]", b"[" * 100_000, b'{"pid": 1, "pid": 2}', b'{"pid": 1}'])
def test_only_its_own_address_is_forgotten(
    start: Callable[..., PrototypeServer], tmp_path: Path, content: bytes
) -> None:
    server = start(ready=False)
    file = tmp_path / ADDRESS
    file.write_bytes(content)
    server.forget(tmp_path)
    assert file.read_bytes() == content
    server.describe(tmp_path, tmp_path)
    server.forget(tmp_path)
    assert not file.exists()


def test_no_proxy_is_asked(start: Callable[..., PrototypeServer], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("grpc_proxy", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with PrototypeClient(Connection(f"127.0.0.1:{server.port}", TOKEN), timeout=20) as client:
            assert client.table().clusters == 8
        proxy.settimeout(0.2)
        with pytest.raises(TimeoutError):
            proxy.accept()


def test_a_name_for_loopback_is_not_taken_for_one_of_the_network(
    start: Callable[..., PrototypeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian has its own name in /etc/hosts: on other machines it is another address."""
    resolve = socket.getaddrinfo
    known = {"workstation": "127.0.1.1", "node": "192.0.2.1"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **kinds: resolve(known.get(host, host), *more, **kinds)
    )
    address = Address(host="workstation").settled()
    server = start(address=address)
    server.describe(folder_of(tmp_path), tmp_path)
    content = json.loads((folder_of(tmp_path) / ADDRESS).read_text())
    assert content["address"] == f"127.0.1.1:{server.port}"
    (folder_of(tmp_path) / ADDRESS).write_text(json.dumps(content | {"host": "another"}))
    with pytest.raises(RemoteError, match="listens on the loopback of another alone"):
        connection_of(tmp_path)
    for same in ("node", "localhost", "127.0.0.1", "0.0.0.0"):
        assert Address(host=same).settled() == Address(host=same)
    secured = Address("workstation", 0, tmp_path / "cert.pem", tmp_path / "key.pem")
    assert secured.settled() == secured, "the certificate is of the name"


def test_a_server_of_ipv6_is_found(start: Callable[..., PrototypeServer], tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs ::1")
    server = start(address=Address(host="::1"))
    server.describe(folder_of(tmp_path), tmp_path)
    (folder_of(tmp_path) / TOKEN_FILE).write_text(TOKEN)
    (folder_of(tmp_path) / TOKEN_FILE).chmod(0o600)
    with PrototypeClient(connection_of(tmp_path), timeout=20) as client:
        assert client.connection.address == f"[::1]:{server.port}"
        assert client.table().clusters == 8

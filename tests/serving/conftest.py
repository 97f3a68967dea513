"""A tiny run, its stored prototypes, and a server of them in this process."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from medvlp.serving.answers import Answers
from medvlp.serving.build import SnapshotOptions, build
from medvlp.serving.client import Connection, PrototypeClient
from medvlp.serving.layout import SNAPSHOT, folder_of
from medvlp.serving.limits import Limits
from medvlp.serving.run_model import RunModel, checkpoint_of
from medvlp.serving.server import Address, PrototypeServer
from medvlp.serving.snapshot import Snapshot
from shards.build import BuildOptions, build_shards
from shards.merge import merge
from shards.plan import Part
from shards.sample import StoredImage
from shards.sources.phantom import PhantomSource
from tests.serving.runs import save_run

TOKEN = "a-token-of-more-than-sixteen-characters"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40-pixel phantoms of 48 studies, stored larger than the 32 pixels the encoder sees."""
    root = tmp_path_factory.mktemp("phantoms") / "data"
    options = BuildOptions(image=StoredImage(40), fractions={"train": 0.75, "test": 0.25})
    build_shards(PhantomSource(48, image_size=40, seed=1), root, options, 1, Part(0, 1))
    merge(root)
    return root


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of step 3; nobody changes it."""
    run = tmp_path_factory.mktemp("runs") / "saved"
    save_run(data, run)
    return run


@pytest.fixture(scope="module")
def built(saved: Path) -> Path:
    """The same run with its prototypes stored, of 20 samples from all over the split."""
    build(SnapshotOptions(saved, limit=20, workers=0), lambda line: None)
    return saved


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Path:
    """A copy of the run with its prototypes, to do anything with."""
    return shutil.copytree(built, tmp_path / "run")


@pytest.fixture(scope="module")
def snapshot(built: Path) -> Snapshot:
    """The run's stored prototypes."""
    return Snapshot.read(folder_of(built) / SNAPSHOT)


@pytest.fixture(scope="module")
def model(built: Path, snapshot: Snapshot) -> RunModel:
    """The run's method."""
    return RunModel(checkpoint_of(built, snapshot.origin), torch.device("cpu"))


@pytest.fixture
def start(snapshot: Snapshot, model: RunModel) -> Iterator[Callable[..., PrototypeServer]]:
    """`start(limits, address, ready)` -> a server on a free port, stopped after the test."""
    servers = []

    def make(
        limits: Limits | None = None, address: Address | None = None, ready: bool = True
    ) -> PrototypeServer:
        limits = limits or Limits()
        server = PrototypeServer(address or Address(), TOKEN, limits)
        if ready:
            server.publish(Answers(snapshot, lambda: model, limits))
        server.start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop(grace=0)


@pytest.fixture
def client(start: Callable[..., PrototypeServer]) -> Iterator[PrototypeClient]:
    """A client of a server with default limits."""
    with PrototypeClient(Connection(f"127.0.0.1:{start().port}", TOKEN), timeout=200) as made:
        yield made


def is_closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the peer has closed the connection, or does so within a time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True

"""The chain of connections between ranks, which here are threads of one process."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from medvlp.training import neighbours
from medvlp.training.neighbours import Neighbours

Told = list[Any]


class RanksInThreads:
    """What neighbours ask of `medvlp.distributed`, and what they say of each other."""

    def __init__(self, count: int):
        self.own = threading.local()
        self.told: Told = [None] * count
        self.before_calls: Callable[[Told], None] = lambda told: None
        self.barrier = threading.Barrier(count, action=lambda: self.before_calls(self.told))
        self.chain: list[Neighbours] = []
        self.lost: list[tuple[int, int]] = []
        self.somebody_is_lost = threading.Event()

    def rank(self) -> int:
        return int(self.own.rank)

    def world_size(self) -> int:
        return len(self.told)

    def gather_objects(self, own: object) -> Told:
        self.told[self.rank()] = own
        self.barrier.wait(60)
        return self.told

    def note(self, by: int, rank: int) -> None:
        self.lost.append((by, rank))
        self.somebody_is_lost.set()

    def meet(self) -> None:
        """Have all ranks meet."""
        self.chain = [Neighbours(lambda rank, by=by: self.note(by, rank)) for by in range(len(self.told))]  # type: ignore[misc]

        def meet(rank: int) -> None:
            self.own.rank = rank
            self.chain[rank].meet()

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(len(self.told))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    def connections(self) -> list[int]:
        return [len(one._connections) for one in self.chain]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[RanksInThreads]:
    """Three ranks of one machine."""
    made = RanksInThreads(3)
    monkeypatch.setattr(neighbours, "distributed", made)
    monkeypatch.setattr(logging.getLogger("medvlp"), "propagate", True)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    yield made
    for one in made.chain:
        one.leave(goodbye=True)


def skip_without(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError:
        pytest.skip(f"this machine has no {address}")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_ranks_watch_each_other_over_ipv4_and_ipv6(
    address: str, ranks: RanksInThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(address)
    monkeypatch.setenv("MASTER_ADDR", address)
    ranks.meet()
    assert ranks.connections() == [1, 2, 1]
    assert len({one.run for one in ranks.chain}) == 1
    assert ranks.chain[0].run
    ranks.chain[2].leave(goodbye=False)
    ranks.chain[2]._connections[0].shutdown(socket.SHUT_RDWR)  # as when its process ends
    assert ranks.somebody_is_lost.wait(60)
    assert ranks.lost == [(1, 2)]


def test_a_network_may_be_away_for_some_minutes(ranks: RanksInThreads) -> None:
    """NCCL has one of its own: a run that is well must not end because this one was mended."""
    ranks.meet()
    said = [
        ranks.chain[0]._connections[0].getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    ]
    assert said[0] + said[1] * said[2] == 300


@pytest.mark.parametrize(
    ("named", "met"), [("localhost", "localhost"), ("::1", "127.0.0.1"), ("127.0.1.1", "::1")]
)
def test_where_its_name_is_a_loopback_address_others_call_rank_0_as_they_met_it(
    named: str, met: str, ranks: RanksInThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's /etc/hosts gives a machine's name 127.0.1.1 on that machine; others it leads to themselves."""
    for address in filter(lambda name: ":" in name, (named, met)):
        skip_without(address)
    monkeypatch.setenv("MASTER_ADDR", named)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    # Each resolves the name for itself, perhaps to an address of the other family.
    ranks.before_calls = lambda told: monkeypatch.setenv("MASTER_ADDR", met)
    ranks.meet()
    assert ranks.connections() == [1, 2, 1]
    assert {place[0] for _, place, _ in ranks.told} == {None}


def test_who_cannot_be_reached_is_not_watched(
    ranks: RanksInThreads, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("address family not supported")

    monkeypatch.setattr(socket, "create_server", fails)
    ranks.meet()
    assert ranks.connections() == [0, 0, 0]
    assert [place for _, place, _ in ranks.told] == [None] * 3
    warned = sorted(record.message.split(", which")[0] for record in caplog.records)
    machine = socket.gethostname()
    assert warned == [f"rank {rank} on {machine} is not watched from rank {rank + 1}" for rank in (0, 1)]


def test_strangers_do_not_keep_a_neighbour_out(
    ranks: RanksInThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scanner of ports that connects first and says nothing, and one that says something else."""
    monkeypatch.setattr(neighbours, "_MEETING_SECONDS", 20.0)
    monkeypatch.setattr(neighbours, "_CALLER_SECONDS", 0.3)
    strangers: list[socket.socket] = []

    def call_first(told: Told) -> None:
        for _, place, token in told:
            strangers.extend(socket.create_connection(place) for _ in range(3))
            strangers[-1].sendall(b"GET / HTTP/1.0\r\n\r\n" * 5)
            strangers[-2].sendall(token[:5].encode())

    ranks.before_calls = call_first
    ranks.meet()
    assert ranks.connections() == [1, 2, 1]
    assert not ranks.lost
    for stranger in strangers:
        stranger.close()
    assert not ranks.somebody_is_lost.wait(0.2)


def test_who_is_not_answered_watches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stands as soon as Linux has it, whether or not a neighbour ever takes it."""
    monkeypatch.setattr(neighbours, "_MEETING_SECONDS", 0.2)
    monkeypatch.setattr(neighbours, "_CALLER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert neighbours._visit(server.getsockname()[:2], "ab" * 32) is None
        late, _ = server.accept()
        with late:
            said = neighbours._read(late, 33, 60)
    assert said == b"ab" * 16 + b".", "who takes it later hears a goodbye"


def test_an_error_is_shown_before_the_neighbours_hear_of_it(ranks: RanksInThreads) -> None:
    """Else they would say first that this rank is gone, and only the first error of a node is shown."""
    ranks.meet()
    ranks.chain[1].leave(goodbye=False)
    assert not ranks.somebody_is_lost.wait(0.3)
    ranks.chain[0].leave(goodbye=True)
    ranks.chain[2].leave(goodbye=True)
    assert not ranks.lost

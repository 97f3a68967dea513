"""Cluster workers of two nodes: real processes, two boards, one machine. This process plays the ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import psutil
import pytest
import torch

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.prototypes.board import FAILED, READY, Board, WorkerSettings
from medvlp.prototypes.refresh import refresh_table
from medvlp.prototypes.ring import BankRows, EmbeddingRing
from medvlp.prototypes.supervisor import WorkerSupervisor
from medvlp.prototypes.table import PrototypeTable, put_table, read_table
from tests.prototypes.test_kmeans import mixture
from tests.prototypes.test_supervisor import wait_until

#: Seconds after which a worker is taken for hanging: never reached but by a fault, and soon reached.
PATIENT, HASTY = 240.0, 5.0
CONFIG = PrototypesConfig(sync=False, bank_rows=64, iterations=3, worker_timeout_seconds=PATIENT)
pytestmark = pytest.mark.timeout(900)
ROWS, WIDTH, CLUSTERS, RANKS = 64, 8, 4, 2


class Node:
    """The ranks of one node: their board, rings and worker."""

    def __init__(self, number: int, store: Any, timeout: float):
        self.number, self.store = number, store
        self.supervisor = WorkerSupervisor().start()
        self.board = Board(self.supervisor.path)
        size = EmbeddingRing.size(ROWS, WIDTH)
        config = asdict(CONFIG) | {"worker_timeout_seconds": timeout}
        place = (number, 2, f"127.0.0.1:{store.port}", RANKS)
        self.board.publish(WorkerSettings(*place, ROWS, WIDTH, CLUSTERS, 1, size, config))
        memories = [self.board.ring_memory(rank) for rank in range(RANKS)]
        self.rings = [EmbeddingRing(ROWS, WIDTH, memory) for memory in memories]

    @property
    def worker(self) -> psutil.Process:
        return psutil.Process(self.supervisor.worker_pid)

    def request(self, number: int) -> None:
        for rank, ring in enumerate(self.rings):
            self.board.request(rank, number, ring.written)

    def outcome(self, number: int) -> int:
        wait_until(lambda: self.board.answered()[0] == number)
        return self.board.answered()[1]

    def wait_until_it_takes_part(self, number: int) -> None:
        """Until this node's worker has begun a request and waits for the others, by what it tells them."""
        key = f"node-{self.number}"
        wait_until(lambda: self.store.check([key]) and self.store.get(key) == str(number).encode())


@contextmanager
def two_nodes(timeout: float) -> Iterator[list[Node]]:
    store = distributed.host_store()
    running = [Node(number, store, timeout) for number in range(2)]
    rows = mixture(CLUSTERS, 20, spread=0.3)
    parts = rows.split([10, 30, 40, 0])  # unequal, one ring empty
    first = 0
    for ring, part in zip((ring for node in running for ring in node.rings), parts, strict=True):
        ring.add(part, torch.arange(first, first + len(part)), "image", 3)
        first += len(part)
    try:
        yield running
    finally:
        for node in running:
            node.supervisor.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with two_nodes(PATIENT) as running:
        yield running


@pytest.fixture(scope="module")
def requests(nodes: list[Node]) -> Iterator[int]:
    """Numbers of requests, rising."""
    return iter(range(5, 1000, 5))


def refresh(nodes: list[Node], number: int) -> list[int]:
    for node in nodes:
        node.request(number)
    return [node.outcome(number) for node in nodes]


def tables(nodes: list[Node]) -> list[PrototypeTable]:
    return [read_table(node.board, node.board.other_slot)[0] for node in nodes]


def test_both_nodes_find_the_clusters_of_all_rows(nodes: list[Node], requests: Iterator[int]) -> None:
    assert refresh(nodes, next(requests)) == [READY, READY]
    found = tables(nodes)
    assert found[0].fingerprint == found[1].fingerprint
    rows = BankRows.joined([ring.rows() for node in nodes for ring in node.rings])
    alone, metrics = refresh_table(rows, None, CONFIG, CLUSTERS, 1)
    assert metrics["prototypes/rows"] == 80
    torch.testing.assert_close(found[0].centroids, alone.centroids, atol=1e-6, rtol=0)
    for node in nodes:
        put_table(node.board, found[0])
    assert refresh(nodes, next(requests)) == [READY, READY]
    later = tables(nodes)[0]
    assert later.version == 2
    assert (later.centroids * found[0].centroids).sum(1).min() > 0.99


def test_a_worker_killed_in_a_refresh_costs_only_that_refresh(
    nodes: list[Node], requests: Iterator[int]
) -> None:
    refresh(nodes, next(requests))
    number = next(requests)
    victim = nodes[1].worker
    victim.suspend()
    for node in nodes:
        node.request(number)
    nodes[0].wait_until_it_takes_part(number)
    victim.kill()
    assert nodes[1].outcome(number) == FAILED
    assert nodes[1].board.restarts >= 1
    assert refresh(nodes, next(requests)) == [READY, READY]
    assert tables(nodes)[0].fingerprint == tables(nodes)[1].fingerprint


def test_a_worker_that_comes_late_still_takes_part(nodes: list[Node], requests: Iterator[int]) -> None:
    number, late = next(requests), nodes[1].worker
    late.suspend()
    for node in nodes:
        node.request(number)
    nodes[0].wait_until_it_takes_part(number)
    assert nodes[0].board.answered()[0] != number
    late.resume()
    assert [node.outcome(number) for node in nodes] == [READY, READY]


def test_a_stopped_worker_is_replaced_and_the_others_do_not_wait_for_ever() -> None:
    with two_nodes(HASTY) as nodes:
        numbers = iter(range(5, 10_000, 5))
        refresh_until_ready(nodes, numbers)
        number, restarts = next(numbers), nodes[0].board.restarts
        nodes[0].worker.suspend()
        for node in nodes:
            node.request(number)
        assert [node.outcome(number) for node in nodes] == [FAILED, FAILED]
        assert nodes[0].board.restarts > restarts
        refresh_until_ready(nodes, numbers)


def refresh_until_ready(nodes: list[Node], numbers: Iterator[int]) -> None:
    """Hasty workers may give refreshes up where the machine is busy; one has to succeed."""
    for _ in range(50):
        if refresh(nodes, next(numbers)) == [READY, READY]:
            return
    pytest.fail("no refresh succeeded")


def test_ranks_that_have_gone_on_are_not_kept_waiting(nodes: list[Node], requests: Iterator[int]) -> None:
    left_alone = next(requests)
    nodes[0].request(left_alone)
    nodes[0].wait_until_it_takes_part(left_alone)
    started = time.monotonic()
    assert refresh(nodes, next(requests)) == [READY, READY]
    assert time.monotonic() - started < PATIENT / 2  # takes a fraction of a second where nobody waits


def test_a_damaged_table_fails_the_refresh_and_not_the_worker(
    nodes: list[Node], requests: Iterator[int]
) -> None:
    workers = [node.supervisor.worker_pid for node in nodes]
    refresh(nodes, next(requests))
    found = tables(nodes)
    for node, table in zip(nodes, found, strict=True):
        put_table(node.board, table)
    nodes[1].board._slots[0]._arrays["counts"][0] += 1
    number = next(requests)
    for node in nodes:
        node.request(number)
    assert nodes[1].outcome(number) == FAILED
    put_table(nodes[1].board, found[1])
    assert refresh(nodes, next(requests)) == [READY, READY]
    assert [node.supervisor.worker_pid for node in nodes] == workers

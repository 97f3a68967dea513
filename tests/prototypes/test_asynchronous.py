"""The asynchronous service: one table on all ranks, whatever happens on boards. No worker process here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.prototypes.asynchronous import AsynchronousService
from medvlp.prototypes.board import BOARD, FAILED, PUT_OFF, READY, Board, new_board
from medvlp.prototypes.supervisor import uses_workers
from medvlp.prototypes.table import PrototypeTable, publish_table
from medvlp.prototypes.worker import Worker
from medvlp.ranks import Ranks
from tests.prototypes.test_kmeans import mixture

CONFIG = PrototypesConfig(
    sync=False, refresh_steps=5, bank_rows=64, iterations=3, max_staleness=12, worker_timeout_seconds=5.0
)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Makes boards as a launcher does, without a worker."""
    descriptors = []

    def make() -> str:
        descriptor, path = new_board()
        descriptors.append(descriptor)
        monkeypatch.setenv(BOARD, path)
        return path

    yield make
    for descriptor in descriptors:
        os.close(descriptor)


def build(board: Callable[[], str], **changes: Any) -> tuple[AsynchronousService, Board]:
    path = board()
    service = AsynchronousService(dataclasses.replace(CONFIG, **changes), 4, 8, seed=1)
    worker = Board(path)
    worker.read_settings()
    return service, worker


def end_step(service: AsynchronousService, step: int) -> bool:
    """What the training loop does after a step; whether training goes on."""
    goes_on = service.agree(distributed.greatest_integers_later(service.proposal(step))(), step)
    if service.refresh_due(step):
        service.refresh(step)
    return goes_on


def table(version: int, seed: int = 0) -> PrototypeTable:
    return PrototypeTable.start(mixture(4, 1, seed=seed), version)


def test_workers_are_for_gpus_unless_the_user_says_otherwise() -> None:
    decisions = [
        uses_workers(PrototypesConfig(sync=sync), has_cuda)
        for sync in (None, True, False)
        for has_cuda in (False, True)
    ]
    assert decisions == [False, True, False, False, True, True]


def test_a_refresh_goes_on_behind_the_training(board) -> None:
    service, path = build(board)
    rows = mixture(4, 8)
    service.update({"image": rows[:16], "text": rows[16:]}, torch.arange(16), 0, torch.zeros(16).long())
    worker = Worker(path, path.settings)
    worker.answer_next()
    assert path.answered() == (0, 0)  # nothing was asked for
    for step in range(1, 8):
        end_step(service, step)
        assert service.table is None
    service.update({"image": rows}, torch.arange(32), 7)  # after the request: not part of it
    worker.answer_next()
    assert path.answered() == (5, READY)
    end_step(service, 8)
    metrics = service.metrics()
    assert metrics["prototypes/version"] == 1
    assert metrics["prototypes/rows"] == 32
    assert metrics["prototypes/staleness"] == 0
    assert metrics["prototypes/similarity"] > 0.9
    end_step(service, 9)
    assert service.metrics()["prototypes/staleness"] == 1
    first = service.table
    end_step(service, 10)
    worker.answer_next()
    end_step(service, 11)
    assert service.table.version == 2
    assert (first.centroids * service.table.centroids).sum(1).min() > 0.99  # warm start: ids stay


def test_more_clusters_than_the_ring_can_fill_are_put_off(board) -> None:
    service, path = build(board, bank_rows=3)
    service.update({"image": mixture(4, 8)}, torch.arange(32), 0)
    worker = Worker(path, path.settings)
    for step in range(1, 12):
        end_step(service, step)
        worker.answer_next()
    assert service.table is None
    assert service.metrics()["prototypes/put_off"] == 2
    assert path.answered() == (10, PUT_OFF)


def test_anchors_travel_with_the_request(board) -> None:
    service, path = build(board, anchor_pull=1.0)
    rows = mixture(4, 8)
    service.update({"image": rows}, torch.arange(32), 0)
    service.proposal(5)
    service.refresh(5, anchors=rows[:2])
    Worker(path, path.settings).answer_next()
    end_step(service, 6)
    torch.testing.assert_close(service.table.centroids[:2], rows[:2], atol=1e-3, rtol=0)


def test_only_one_request_is_open_and_a_failed_one_is_made_again(board) -> None:
    service, path = build(board)
    for step in range(1, 12):
        end_step(service, step)
    assert path.requests()[0] == [5]
    path.answer(5, FAILED)
    end_step(service, 12)
    assert service.metrics()["prototypes/failed_refreshes"] == 1
    for step in range(13, 17):
        end_step(service, step)
    assert path.requests()[0] == [15]
    path.answer(5, READY)  # an answer to what nobody waits for any more
    end_step(service, 17)
    assert service.table is None


def test_a_damaged_table_is_a_failed_refresh(board) -> None:
    service, path = build(board)
    end_step(service, 5)
    publish_table(path, table(1), {})
    path._slots[path.other_slot]._arrays["centroids"][0] *= -1
    path.answer(5, READY)
    end_step(service, 6)
    assert service.table is None
    assert service.metrics()["prototypes/failed_refreshes"] == 1


def test_a_restarted_worker_gives_up_what_its_predecessor_began(board) -> None:
    service, path = build(board)
    service.update({"image": mixture(4, 8)}, torch.arange(32), 0)
    end_step(service, 5)
    path.restarts += 1
    worker = Worker(path, path.settings)
    assert path.answered() == (5, FAILED)
    end_step(service, 6)
    assert service.metrics()["prototypes/worker_restarts"] == 1
    end_step(service, 10)
    worker.answer_next()
    end_step(service, 11)
    assert service.table.version == 1


@pytest.mark.parametrize("policy", ["continue", "drop_loss", "block"])
def test_stale_clusters(board, policy: str, caplog: pytest.LogCaptureFixture) -> None:
    service, path = build(board, stale=policy)
    service.load_state_dict({"table": table(3).state_dict(), "swapped": 0})
    assert all(end_step(service, step) for step in range(1, 13))
    assert service.usable_table is service.table
    assert end_step(service, 13) == (policy != "block")
    assert (service.usable_table is None) == (policy == "drop_loss")
    end_step(service, 14)
    assert caplog.text.count("13 steps old") == 1
    assert "14 steps old" not in caplog.text
    publish_table(path, table(4), {})
    path.answer(5, READY)
    assert end_step(service, 14)
    assert service.usable_table.version == 4
    for step in range(15, 40):
        end_step(service, step)
    assert caplog.text.count("steps old") == 2  # the next occurrence


def test_a_blocked_training_goes_on_when_the_refresh_has_failed(board) -> None:
    service, path = build(board, stale="block")
    for step in range(1, 14):
        end_step(service, step)
    assert not end_step(service, 14)
    path.answer(5, FAILED)
    assert end_step(service, 14)


def test_a_checkpoint_has_the_table_and_forgets_the_request(board) -> None:
    service, path = build(board)
    end_step(service, 5)
    publish_table(path, table(1), {})
    path.answer(5, READY)
    for step in range(6, 11):
        end_step(service, step)
    state = service.state_dict()
    assert sorted(state) == ["step", "swapped", "table"]
    other, other_path = build(board)
    other.load_state_dict(state)
    assert other.table.fingerprint == service.table.fingerprint
    assert other_path.table(other_path.in_use).state["version"] == 1  # the worker starts from it
    for step in range(11, 16):
        end_step(other, step)
    assert other.metrics()["prototypes/staleness"] == 9
    assert other_path.requests()[0] == [15]


def test_stale_clusters_are_stale_from_the_first_step_of_a_resumed_run(board) -> None:
    """The ranks may first agree many steps later."""
    service, _ = build(board, stale="drop_loss")
    service.load_state_dict({"table": table(3).state_dict(), "swapped": 100})  # of a version without the step
    assert service.staleness == 0
    end_step(service, 113)
    assert service.usable_table is None
    resumed, _ = build(board, stale="drop_loss")
    resumed.load_state_dict(service.state_dict())
    assert resumed.staleness == 13
    assert resumed.usable_table is None


def two_nodes(outcomes: list[tuple[int, int, int]], paths: list[str]) -> list[tuple[int, int, int]]:
    """Versions, mismatches and failures seen at every step by a rank that is alone on its node.

    Each outcome is what the worker of this node says: (at the end of which step, about request 5, 10, ...,
    with which seed, 0: it failed).
    """
    os.environ[BOARD] = paths[distributed.rank()]
    ranks = Ranks("torchrun", distributed.rank(), 2, 0, 1)
    service = AsynchronousService(CONFIG, 4, 8, 1, ranks)
    worker = Board(paths[distributed.rank()])
    worker.read_settings()
    seen = []
    for step in range(1, 30):
        for at, request, seed in outcomes[distributed.rank()]:
            if at == step and seed:
                publish_table(
                    worker, table(1 if service.table is None else service.table.version + 1, seed), {}
                )
            if at == step:
                worker.answer(request, READY if seed else FAILED)
        end_step(service, step)
        version = 0 if service.table is None else service.table.version
        metrics = service.metrics()
        counts = [int(metrics[f"prototypes/{name}"]) for name in ("mismatches", "failed_refreshes")]
        seen.append((version, *counts))
    service.close()
    del os.environ[BOARD]
    return seen


@pytest.mark.dist
def test_all_nodes_swap_at_the_same_step_or_not_at_all(gloo_pool) -> None:
    boards = [new_board() for _ in range(2)]
    outcomes = [
        [(6, 5, 1), (11, 10, 2), (16, 15, 4), (21, 20, 5)],
        [(8, 5, 1), (12, 10, 3), (17, 15, 0), (23, 20, 5)],
    ]
    seen = gloo_pool(2).run(two_nodes, outcomes, [path for _, path in boards])
    for descriptor, _ in boards:
        os.close(descriptor)
    assert seen[0] == seen[1]
    versions = [version for version, _, _ in seen[0]]
    assert versions == [0] * 7 + [1] * 15 + [2] * 7  # swaps at steps 8 and 23
    assert seen[0][10:12] == [(1, 0, 0), (1, 1, 0)]  # the mismatch is found at step 12
    assert seen[0][15:17] == [(1, 1, 0), (1, 1, 1)]  # the failure of one node at step 17

"""The board of a node: settings, requests, answers, tables; nothing of it stays behind."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from medvlp.prototypes.board import (
    CONFIGURED,
    DECLINED,
    READY,
    WAITING,
    Board,
    BoardError,
    WorkerSettings,
    new_board,
)
from medvlp.prototypes.ring import EmbeddingRing

SETTINGS = WorkerSettings(0, 1, "", 2, 16, 4, 3, 0, EmbeddingRing.size(16, 4), {"worker_threads": None})


@pytest.fixture
def path() -> Iterator[str]:
    descriptor, path = new_board()
    yield path
    os.close(descriptor)


def stored(version: int) -> dict:
    return {
        "centroids": np.eye(3, 4, dtype=np.float32),
        "counts": np.full(3, version, np.float32),
        "log_bias": np.zeros(3, np.float32),
        "temperatures": np.ones(3, np.float32),
        "version": version,
        "temperature": 1.0,
        "balance": "none",
    }


def test_a_worker_waits_for_the_plan(path: str) -> None:
    rank, worker = Board(path), Board(path)
    assert worker.state == WAITING
    assert worker.read_settings() is None
    rank.publish(SETTINGS)
    assert worker.state == CONFIGURED
    assert worker.read_settings() == SETTINGS


def test_a_board_can_be_declined(path: str) -> None:
    Board(path).decline()
    assert Board(path).state == DECLINED


def test_a_damaged_plan_is_refused(path: str) -> None:
    Board(path).publish(SETTINGS)
    with Path(path).open("r+b") as file:
        file.seek(4096 + 3)
        file.write(b"?")
    with pytest.raises(BoardError, match="damaged"):
        Board(path).read_settings()


def test_a_plan_larger_than_its_memory_is_refused(path: str) -> None:
    Board(path).publish(SETTINGS)
    os.truncate(path, 100_000)
    with pytest.raises(BoardError, match="100000 bytes"):
        Board(path).read_settings()


@pytest.mark.parametrize("change", [{"ranks": 0}, {"node": 1}, {"width": -4}])
def test_impossible_plans_are_refused(change: dict) -> None:
    with pytest.raises(BoardError, match="cannot be"):
        dataclasses.replace(SETTINGS, **change)


def test_something_else_is_no_board(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    with pytest.raises(BoardError, match="no board"):
        Board(str(file))
    with pytest.raises(BoardError, match="cannot open"):
        Board(str(tmp_path / "nothing"))


def test_tables_go_into_the_slot_that_is_not_in_use(path: str) -> None:
    board, worker = Board(path), Board(path)
    board.publish(SETTINGS)
    worker.read_settings()
    assert board.in_use is None
    for version in (1, 2, 3):
        worker.write_table(stored(version), 100 + version, {"seconds": 0.5})
        worker.answer(10 * version, READY)
        assert board.answered() == (10 * version, READY)
        table = board.table(board.other_slot)
        assert (table.state["version"], table.fingerprint) == (version, 100 + version)
        assert table.metrics == {"seconds": 0.5}
        np.testing.assert_array_equal(table.state["counts"], np.full(3, version))
        if board.in_use is not None:
            assert board.table(board.in_use).state["version"] == version - 1
        board.use(board.other_slot)
    board.put(stored(7), 107)
    assert worker.table(worker.in_use).state["version"] == 7


def test_a_damaged_table_is_refused(path: str) -> None:
    board = Board(path)
    board.publish(SETTINGS)
    board.write_table(stored(1), 101, {})
    board._slots[board.other_slot]._arrays["centroids"][0, 0] += 1e-6
    with pytest.raises(BoardError, match="damaged"):
        board.table(board.other_slot)


def test_requests_and_anchors(path: str) -> None:
    board, worker = Board(path), Board(path)
    board.publish(SETTINGS)
    worker.read_settings()
    assert worker.anchors() is None
    board.set_anchors(np.ones((2, 4), np.float32))
    board.request(0, 5, 12)
    board.request(1, 5, 13)
    assert worker.requests() == ([5, 5], [12, 13])
    assert worker.anchors().shape == (2, 4)
    board.set_anchors(None)
    assert worker.anchors() is None


def test_rings_do_not_touch_each_other_and_memory_is_bounded(path: str) -> None:
    board = Board(path)
    board.publish(SETTINGS)
    rings = [EmbeddingRing(16, 4, board.ring_memory(rank)) for rank in range(2)]
    for _ in range(50):
        for rank, ring in enumerate(rings):
            ring.add(torch.full((16, 4), rank + 1.0), torch.full((16,), rank), "image", 0)
    for rank, ring in enumerate(rings):
        assert set(ring.rows().sample.tolist()) == {rank}
    tables = 4 * 3 * (4 + 3)
    assert Path(path).stat().st_size <= 2 * SETTINGS.ring_bytes + 2 * tables + 32 * 4096


def test_nothing_is_left_when_all_have_ended() -> None:
    descriptor, path = new_board()
    board = Board(path)
    board.publish(SETTINGS)
    assert not [file for file in Path("/dev/shm").iterdir() if "medvlp" in file.name]
    os.close(descriptor)
    with pytest.raises(BoardError):
        Board(path)

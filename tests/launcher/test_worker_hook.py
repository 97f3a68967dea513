"""The launcher keeps the cluster worker of its node, where the run may need one."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from launcher import local
from medvlp.prototypes.board import BOARD, WAITING, Board


def find_worker() -> psutil.Process:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        for child in psutil.Process().children():
            if "medvlp.prototypes.worker" in child.cmdline():
                return child
        time.sleep(0.02)
    raise AssertionError("no worker was started")


@pytest.mark.parametrize("workers", [True, False])
def test_the_ranks_find_the_board_of_their_launcher(workers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run(arguments, environments, *place):
        seen.update(environments)
        if workers:
            assert Board(environments[0][BOARD]).state == WAITING
            seen["worker"] = find_worker()
        return []

    monkeypatch.delenv(BOARD, raising=False)
    monkeypatch.setattr(local, "_run_processes", run)
    assert local.launch(["pretrain"], 2, has_cuda=False, workers=workers) == 0
    boards = [seen[rank].get(BOARD) for rank in range(2)]
    assert boards[0] == boards[1]
    assert (boards[0] is not None) == workers
    if workers:
        assert not Path(boards[0]).exists()  # its memory went with it
        assert not seen["worker"].is_running()

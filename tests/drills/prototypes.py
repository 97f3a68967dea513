"""Cluster workers that are stopped, killed and contradicted, in a run of two nodes on this machine.

What must hold is in medvlp/prototypes/README.md: in every step all ranks use clusters of one version,
training goes on, the next refresh works, and nothing of anything stays behind.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch

from medvlp.prototypes.board import BOARD, READY, Board
from medvlp.prototypes.table import PrototypeTable, publish_table, read_table
from medvlp.training.interrupts import EXIT_INTERRUPTED
from tests.drills.outcomes import Case, expect
from tests.drills.process import Pretraining, read_lines
from tests.drills.workplace import RUN, Workplace

REFRESH, STALE = 5, 25
_CLUSTERS = [
    "method.prototype_source=clusters", "prototypes.sync=false", f"prototypes.refresh_steps={REFRESH}",
    f"prototypes.max_staleness={STALE}", "train.steps=100000", "checkpoint.every_steps=20",
]  # fmt: skip
#: Seconds a worker stands still.
_STILL = 30.0


def cases(place: Workplace) -> list[Case]:
    """Every failure once."""
    return [
        Case("prototypes", f"a worker stands still for {_STILL:.0f} s", lambda: _delayed(place)),
        Case("prototypes", "a worker hangs", lambda: _hanging(place)),
        Case("prototypes", "SIGKILL to a worker in a refresh", lambda: _worker_killed(place)),
        Case("prototypes", "SIGKILL to a rank, and the resume", lambda: _rank_killed(place)),
        Case("prototypes", "two nodes with different clusters", lambda: _mismatch(place)),
        Case("prototypes", "SIGKILL to a launcher", lambda: _launcher_killed(place)),
    ]


class TwoNodes:
    """A run of two nodes with one rank and one cluster worker each.

    Args:
        place: where. name: of the run folder. more: overrides.

    Attributes:
        nodes: the launchers' processes.
    """

    def __init__(self, place: Workplace, name: str, *more: str):
        self.folder = place.folder / "prototypes" / name
        self._settings = [*RUN, *_CLUSTERS, f"data.root={place.data}", *more]
        self._stack = ExitStack()
        self.nodes: list[Pretraining] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start, or start again."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            meet = f"127.0.0.1:{probe.getsockname()[1]}"
        self.nodes = []
        for node in range(2):
            placement = ("--nodes", "2", "--node-rank", str(node), "--meet", meet)
            run = Pretraining(self.folder, self._settings, 1, placement=placement)
            self.nodes.append(self._stack.enter_context(run))

    def board(self, node: int) -> Board:
        """The board of a node."""
        board = Board(self.nodes[node].worker().environ()[BOARD])
        board.read_settings()
        return board

    def lines(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl; the last one may still be on its way."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def newest(self, figure: str) -> float:
        """Last value of a figure of the service; 0 before the first line."""
        lines = self.lines()
        return lines[-1][f"prototypes/{figure}"] if lines else 0.0

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait while the run goes on."""
        self.nodes[0].wait_until(condition, what, pause=0.05)

    def wait_for_version(self, version: float) -> None:
        """Wait until the ranks use at least this version."""
        self.wait_until(lambda: self.newest("version") >= version, f"version {version:.0f} of the clusters")

    def stop(self) -> str:
        """Ask for a checkpoint and the end; what the steps of the whole run show, in words."""
        left = self.processes()
        self.nodes[1].process.send_signal(signal.SIGTERM)
        codes = [node.end(120) for node in self.nodes]
        expect(codes == 2 * [EXIT_INTERRUPTED], f"ended with codes {codes}: {self.nodes[0].tail()}")
        self.expect_gone(*left)
        return self.check()

    def processes(self) -> tuple[list[psutil.Process], list[int]]:
        """The workers, and the inodes of the nodes' boards."""
        workers = [node.worker() for node in self.nodes]
        return workers, [Path(worker.environ()[BOARD]).stat().st_ino for worker in workers]

    def expect_gone(self, processes: list[psutil.Process], boards: list[int]) -> None:
        """Neither of these processes is left, nor anybody who keeps the memory of a board."""
        _, alive = psutil.wait_procs(processes, timeout=10)
        expect(not alive, f"processes are left: {alive}")
        holders = [pid for pid in psutil.pids() if pid != os.getpid() and _holds(pid, boards)]
        expect(not holders, f"processes {holders} keep the memory of a board")
        leftovers = [path.name for path in Path("/dev/shm").glob("*medvlp*")]
        expect(not leftovers, f"shared memory is left: {leftovers}")

    def check(self) -> str:
        """Every step: one version on both ranks, never an older one, a finite loss.

        Raises:
            DrillError: a step shows something else.
        """
        lines, used = read_lines(self.folder / "metrics.jsonl"), read_lines(self.folder / "samples.jsonl")
        steps = [line["step"] for line in lines]
        expect(steps == list(range(1, len(steps) + 1)), f"steps {steps[:3]} ... {steps[-3:]}")
        skewed = [line["step"] for line in used if len(set(line["clusters"])) > 1]
        expect(not skewed, f"ranks used different versions in steps {skewed}")
        versions = [line["clusters"][0] for line in used]
        expect(versions == sorted(versions), "an older version came back")
        bad = [line["step"] for line in lines if line["loss"] is None or not math.isfinite(line["loss"])]
        expect(not bad, f"no loss in steps {bad}")
        return f"{len(steps)} steps, one version in each, up to {versions[-1]}"


def _holds(pid: int, inodes: list[int]) -> bool:
    """Whether a process has one of these boards in its memory."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # it has ended
        return False
    return any("memfd:medvlp-board" in line and int(line.split()[4]) in inodes for line in lines)


def _delayed(place: Workplace) -> str:
    with TwoNodes(place, "delayed", "prototypes.worker_timeout_seconds=60") as run:
        run.wait_for_version(1)
        worker = run.nodes[1].worker()
        worker.suspend()
        before, step = run.newest("version"), len(run.lines())
        time.sleep(_STILL)
        steps, stale = len(run.lines()) - step, run.newest("staleness")
        expect(steps > STALE and stale > STALE, f"{steps} steps meanwhile, clusters {stale:.0f} steps old")
        expect(run.newest("version") <= before + 1, "new clusters without this worker")
        worker.resume()
        run.wait_for_version(before + 2)
        expect(run.nodes[1].worker().pid == worker.pid, "the worker was replaced")
        told = f"the clusters are {STALE + 1} steps old"
        expect(told in run.nodes[0].output(), f"no {told!r}")
        return f"{steps} steps meanwhile, clusters up to {stale:.0f} steps old; then refreshed; {run.stop()}"


def _hanging(place: Workplace) -> str:
    with TwoNodes(place, "hanging", "prototypes.worker_timeout_seconds=5") as run:
        run.wait_for_version(1)
        worker = run.nodes[1].worker()
        worker.suspend()
        run.wait_until(lambda: not worker.is_running(), "the end of the worker")
        run.wait_until(lambda: run.newest("worker_restarts") >= 1, "a restart in the metrics")
        run.wait_for_version(run.newest("version") + 2)
        return f"killed after 5 s and started again; {run.stop()}"


def _worker_killed(place: Workplace) -> str:
    # Enough to be hit; workers give way to ranks, so that many more may take minutes on a busy machine.
    with TwoNodes(place, "worker-killed", "prototypes.iterations=500") as run:
        run.wait_for_version(1)
        board = run.board(1)
        worker = run.nodes[1].worker()

        def is_open() -> bool:
            return board.requests()[0][0] > board.answered()[0]

        run.wait_until(lambda: not is_open(), "the end of a refresh")
        run.wait_until(is_open, "a refresh")
        worker.suspend()
        expect(is_open(), "the refresh was too short to be hit")
        worker.kill()
        failed, step = board.requests()[0][0], len(run.lines())
        run.wait_until(lambda: run.newest("failed_refreshes") >= 1, "the failed refresh in the metrics")
        version = run.newest("version")
        run.wait_for_version(version + 1)
        restarts, steps = run.newest("worker_restarts"), len(run.lines()) - step
        expect(restarts == 1, f"{restarts} restarts")
        seen = run.stop()
        return f"refresh {failed} given up by both nodes, next one after {steps} steps; {seen}"


def _rank_killed(place: Workplace) -> str:
    with TwoNodes(place, "rank-killed") as run:
        run.wait_for_version(2)
        run.wait_until(lambda: any((run.folder / "checkpoints").glob("step-*")), "a checkpoint")
        run.wait_for_version(run.newest("version") + 1)
        left = run.processes()
        run.nodes[1].rank(1).kill()
        codes = [node.end(120) for node in run.nodes]
        expect(codes == [6, 128 + signal.SIGKILL], f"ended with codes {codes}")
        run.expect_gone(*left)
        version = int(read_lines(run.folder / "samples.jsonl")[-1]["clusters"][0])
        run.start()
        run.wait_for_version(version + 2)
        return f"codes {codes}, both workers gone; resumed with the table; {run.stop()}"


def _mismatch(place: Workplace) -> str:
    with TwoNodes(place, "mismatch", "prototypes.worker_timeout_seconds=60") as run:
        run.wait_for_version(2)
        boards = [run.board(node) for node in range(2)]
        workers = [node.worker() for node in run.nodes]
        for worker in workers:
            worker.suspend()
        # The drill speaks for the workers: each says something else of the next request.
        run.wait_until(
            lambda: all(board.requests()[0][0] > board.answered()[0] for board in boards), "a request"
        )
        number = boards[0].requests()[0][0]
        assert boards[0].in_use is not None
        old, _ = read_table(boards[0], boards[0].in_use)
        for seed, board in enumerate(boards):
            directions = torch.randn(old.centroids.shape, generator=torch.Generator().manual_seed(seed))
            publish_table(board, PrototypeTable.start(directions, old.version + 1), {})
            board.answer(number, READY)
        run.wait_until(lambda: run.newest("mismatches") == 1, "the mismatch in the metrics")
        expect(run.newest("version") == old.version, "somebody uses one of the two")
        for worker in workers:
            worker.resume()
        run.wait_for_version(old.version + 2)
        told = f"clusters of request {number} differ"
        expect(told in run.nodes[0].output(), f"no {told!r}")
        return f"request {number} discarded by both ranks, the next one used; {run.stop()}"


def _launcher_killed(place: Workplace) -> str:
    with TwoNodes(place, "launcher-killed") as run:
        run.wait_for_version(1)
        workers, boards = run.processes()
        rank = run.nodes[1].rank(1)
        run.nodes[1].process.kill()
        code = run.nodes[0].end(120)
        expect(code == 6, f"the other node ended with code {code}")
        run.expect_gone([*workers, rank], boards)
        return "its rank and worker died with it, the other node ended with code 6"

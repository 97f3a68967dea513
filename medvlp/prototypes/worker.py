"""`python -m medvlp.prototypes.worker`: the cluster worker of one node, the only process of a run with FAISS.

Started by `WorkerSupervisor`. It waits for its settings, then answers one request after the other. No torch
and no FAISS before they are there.
"""

import importlib
import logging
import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

from medvlp.lifetime import die_with
from medvlp.prototypes.board import BOARD, DECLINED, FAILED, PUT_OFF, READY, Board, WorkerSettings
from medvlp.prototypes.supervisor import SUPERVISOR

logger = logging.getLogger("medvlp.prototypes.worker")

#: Seconds between two looks at the board or store, and between two heartbeats.
LOOK_SECONDS, HEARTBEAT_SECONDS = 0.02, 0.5
#: What a refresh imports where it is used: here before the first one, in which other workers would wait.
SLOW_MODULES = ("faiss", "sklearn.cluster", "sklearn.metrics", "medvlp.prototypes.refresh")
#: Added to the niceness: training comes first.
NICENESS = 10


class PartialRefreshError(RuntimeError):
    """A refresh in which not all nodes take part."""


def main() -> None:
    """Work until the supervisor says otherwise; returns when this run needs no worker."""
    die_with(int(os.environ[SUPERVISOR]))
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # requests to save, which Slurm sends to every process
    os.nice(NICENESS)
    logging.basicConfig(
        format="%(asctime)s cluster worker: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING
    )
    board = Board(os.environ[BOARD])
    threading.Thread(target=_send_heartbeats, args=(board,), name="medvlp-heartbeat", daemon=True).start()
    while (settings := board.read_settings()) is None:
        if board.state == DECLINED:
            return
        time.sleep(LOOK_SECONDS)
    threads = settings.config["worker_threads"] or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch and FAISS are imported
    # Its GPU, if it takes one, is the last rank's: the first has the most to hold (weights on their way).
    os.environ["LOCAL_RANK"] = str(settings.ranks - 1)
    for name in SLOW_MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(threads)
    board.start_is_over()
    Worker(board, settings).run()


def _send_heartbeats(board: Board) -> None:
    """Tells a worker that was stopped or starved from one that waits: all its waiting has time-outs."""
    while True:
        board.heartbeat(time.monotonic_ns())
        time.sleep(HEARTBEAT_SECONDS)


class Worker:
    """Answers the requests on a board, each with the workers of the other nodes.

    Args:
        board, settings: of this node.
    """

    def __init__(self, board: Board, settings: WorkerSettings):
        from medvlp.config import PrototypesConfig

        self.board, self.settings = board, settings
        self.config = PrototypesConfig(**settings.config)
        self._timeout = timedelta(seconds=self.config.worker_timeout_seconds)
        self._rings: list[Any] = []
        self._store: Any = None
        self._meeting: Any = None
        if board.restarts:
            self._cancel_what_was_asked_before()

    def _cancel_what_was_asked_before(self) -> None:
        """A request that an earlier worker has left open: the other nodes have begun it with that one."""
        latest = max(self.board.requests()[0])
        if latest > self.board.answered()[0]:
            self.board.answer(latest, FAILED)

    def run(self) -> None:
        """Answer requests for ever."""
        while True:
            self.answer_next()
            time.sleep(LOOK_SECONDS)

    def answer_next(self) -> None:
        """Answer the request that all ranks of this node have made, if there is a new one."""
        numbers, cursors = self.board.requests()
        if min(numbers) == max(numbers) > self.board.answered()[0]:
            self.board.answer(numbers[0], self.refresh(numbers[0], cursors))

    def refresh(self, number: int, cursors: list[int]) -> int:
        """Cluster the rows of all nodes and write the table; returns the outcome."""
        from medvlp import distributed
        from medvlp.prototypes.refresh import refresh_table
        from medvlp.prototypes.table import publish_table

        settings = self.settings
        try:
            rows, old, anchors = self._rows(cursors), self._old_table(), self._anchors()
            if settings.nodes > 1:
                store = self._meet(number)
                with distributed.temporary_group(store, settings.node, settings.nodes, self._timeout):
                    table, metrics = refresh_table(
                        rows, old, self.config, settings.clusters, settings.seed, anchors
                    )
            else:
                table, metrics = refresh_table(
                    rows, old, self.config, settings.clusters, settings.seed, anchors
                )
        except (RuntimeError, ValueError) as error:  # of gloo and its stores, a damaged board, a misfit
            reason = " ".join(str(error).split())[:200]
            logger.warning("node %d cancels refresh %d: %s", settings.node, number, reason)
            self._store = None  # after a time-out its connection may be out of step
            return FAILED
        if table is None:
            return PUT_OFF
        metrics["prototypes/torn_rows"] = float(sum(ring.torn for ring in self._rings))
        publish_table(self.board, table, metrics)
        return READY

    def _rows(self, cursors: list[int]) -> Any:
        from medvlp.prototypes.ring import BankRows, EmbeddingRing

        if not self._rings:
            memories = map(self.board.ring_memory, range(self.settings.ranks))
            self._rings = [EmbeddingRing.attach(memory) for memory in memories]
        return BankRows.joined([ring.rows(cursor) for ring, cursor in zip(self._rings, cursors, strict=True)])

    def _old_table(self) -> Any:
        from medvlp.prototypes.table import read_table

        return None if self.board.in_use is None else read_table(self.board, self.board.in_use)[0]

    def _anchors(self) -> Any:
        import torch

        anchors = self.board.anchors()
        return None if anchors is None else torch.from_numpy(anchors)

    def _meet(self, number: int) -> Any:
        """Wait until the workers of all nodes are at this request; the store in which they form a group.

        The run's store keeps two words of each node. A refresh has a store of its own, served by the first
        node's worker, so that nothing of an earlier one, failed or not, is ever found in it.

        Raises:
            PartialRefreshError: they are not all there in time, or the ranks have gone on to another request.
            RuntimeError: a store does not answer.
        """
        from medvlp import distributed

        host, _, port = self.settings.store.rpartition(":")
        if self._store is None:
            self._store = distributed.connect_store(host, int(port), self._timeout)
        if self.settings.node == 0:
            self._meeting = distributed.host_store()
            self._store.set("meeting", str(self._meeting.port))
        self._store.set(f"node-{self.settings.node}", str(number))
        names = [f"node-{node}" for node in range(self.settings.nodes)]
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not (self._store.check(names) and set(self._store.multi_get(names)) == {str(number).encode()}):
            if max(self.board.requests()[0]) > number:
                raise PartialRefreshError("the ranks have gone on without it")
            if time.monotonic() > deadline:
                raise PartialRefreshError(
                    f"not all {self.settings.nodes} nodes took part within {self._timeout}"
                )
            time.sleep(LOOK_SECONDS)
        if self.settings.node == 0:
            return self._meeting
        return distributed.connect_store(host, int(self._store.get("meeting")), self._timeout)


if __name__ == "__main__":
    main()

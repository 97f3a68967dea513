"""Keeps the cluster worker of one node alive: starts it, restarts it, ends it. No torch."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from medvlp.config import PrototypesConfig
from medvlp.prototypes.board import BOARD, Board, new_board
from medvlp.ranks import Ranks

logger = logging.getLogger(__name__)

#: Environment variable with the process id of the supervisor, which the worker must not outlive.
SUPERVISOR = "MEDVLP_SUPERVISOR_PID"
#: Set for a worker whose predecessor was aborted, which FAISS does where CUDA fails it: it leaves GPUs alone.
NO_GPU = "MEDVLP_SEARCH_WITHOUT_GPU"
#: Seconds between two looks at the worker; before the first restart; at most before a later one (it doubles).
LOOK_SECONDS, FIRST_PAUSE, LONGEST_PAUSE = 0.2, 0.5, 60.0
#: A worker that has lived so long had no trouble starting: the pause before its restart is the first again.
SETTLED_SECONDS = 60.0
#: Seconds a worker gets to end on SIGTERM.
GRACE_SECONDS = 5.0
#: Seconds without a heartbeat after which a worker hangs while it starts: beside a training, imports of torch
#: and FAISS at low priority are slow and hold the interpreter's lock; a short limit ends its successors too.
START_SECONDS = 300.0


def uses_workers(config: PrototypesConfig, has_cuda: bool) -> bool:
    """Whether service clusters are refreshed by workers; launcher and ranks decide by this alone."""
    return has_cuda if config.sync is None else not config.sync


def decline_worker(ranks: Ranks) -> None:
    """Let the worker that a launcher may have started on this node end: this run has nothing for it."""
    if ranks.local_rank == 0 and BOARD in os.environ:
        Board(os.environ[BOARD]).decline()


class WorkerSupervisor:
    """Context manager: inside it the node has a board and a cluster worker.

    The supervisor is the launcher of the node, or its first rank when another program launched that. A worker
    that dies, or once started sends no heartbeat for `prototypes.worker_timeout_seconds`, is started again,
    after a pause that doubles while it keeps dying, and without a GPU once one was aborted; one that ends
    with code 0 had nothing to do. Linux kills the worker when the supervisor dies.

    Attributes:
        board: of the node; its `restarts` counts.
        path: of the board, for the ranks.
    """

    def __init__(self) -> None:
        self._descriptor, self.path = new_board()
        self.board = Board(self.path)
        self._worker: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._aborted = False
        # Linux ends the worker with the thread that started it, so one thread does all of it.
        self._thread = threading.Thread(target=self._supervise, name="medvlp-worker-supervisor", daemon=True)

    @property
    def environment(self) -> Mapping[str, str]:
        """What the ranks of this node need in their environment."""
        return {BOARD: self.path}

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker, while there is one."""
        worker = self._worker
        return None if worker is None else worker.pid

    def start(self) -> Self:
        """Start the worker; it waits for the board's settings."""
        self._thread.start()
        return self

    def close(self) -> None:
        """End the worker, by force if it takes long, and give the board's memory back."""
        self._closing.set()
        self._thread.join(4 * GRACE_SECONDS)  # longer only where a killed worker waits for a dead disk
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _supervise(self) -> None:
        pause = FIRST_PAUSE
        while not self._closing.is_set():
            started = time.monotonic()
            self._worker = self._start_worker()
            code = self._watch(self._worker)
            if self._closing.is_set() or code == 0:
                break
            if time.monotonic() - started > SETTLED_SECONDS:
                pause = FIRST_PAUSE
            self.board.restarts += 1
            self._aborted = self._aborted or code == -signal.SIGABRT
            logger.warning("the cluster worker of this node ended (code %d); it starts again", code)
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self._worker = None

    def _start_worker(self) -> subprocess.Popen[bytes]:
        self.board.heartbeat(time.monotonic_ns())
        # numpy makes its threads at its import, before the worker has read how many it may have.
        settings = {BOARD: self.path, SUPERVISOR: str(os.getpid()), "OPENBLAS_NUM_THREADS": "1"}
        if self._aborted:
            settings[NO_GPU] = "1"
        # A session of its own: Ctrl-C is for the ranks, which save a checkpoint first.
        return subprocess.Popen(
            [sys.executable, "-m", "medvlp.prototypes.worker"],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _watch(self, worker: subprocess.Popen[bytes]) -> int:
        """Wait until the worker has ended, by itself or by our hand; its exit code."""
        while worker.poll() is None:
            if self._closing.wait(LOOK_SECONDS):
                worker.terminate()
                try:
                    return worker.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    worker.kill()
            elif time.monotonic_ns() - self.board.last_heartbeat > 1e9 * self._patience():
                logger.warning("the cluster worker of this node sends no heartbeat; killing it")
                worker.kill()
                worker.wait()
        return worker.returncode

    def _patience(self) -> float:
        settings = self.board.read_settings()
        if settings is None or self.board.started_worker != self.worker_pid:
            return START_SECONDS
        return float(settings.config["worker_timeout_seconds"])

"""Supervision of the cluster worker: restarts, hangs, ends; nothing outlives anybody. Workers are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from medvlp.config import PrototypesConfig
from medvlp.prototypes import supervisor as module
from medvlp.prototypes.board import BOARD, WorkerSettings
from medvlp.prototypes.ring import EmbeddingRing
from medvlp.prototypes.supervisor import NO_GPU, WorkerSupervisor, decline_worker
from medvlp.ranks import Ranks


@pytest.fixture
def supervisor() -> Iterator[WorkerSupervisor]:
    with WorkerSupervisor() as running:
        yield running


def wait_until(condition: Callable[[], object], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def wait_for_heartbeat(supervisor: WorkerSupervisor) -> None:
    """Until the worker of this moment has found the board, and sends a heartbeat once more."""
    wait_until(lambda: supervisor.worker_pid is not None)
    # The supervisor itself sets the first one when it starts a worker, so a second one is waited for as well.
    for _ in range(2):
        before = supervisor.board.last_heartbeat
        wait_until(lambda before=before: supervisor.board.last_heartbeat > before)


def test_a_killed_worker_is_started_again(supervisor: WorkerSupervisor) -> None:
    wait_for_heartbeat(supervisor)
    first = supervisor.worker_pid
    assert psutil.Process(first).nice() >= 10
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: supervisor.worker_pid not in (None, first))
    assert supervisor.board.restarts == 1
    wait_for_heartbeat(supervisor)


def test_after_an_abort_the_worker_leaves_gpus_alone(supervisor: WorkerSupervisor) -> None:
    """FAISS aborts its process where CUDA fails it; the next one would do the same, for ever."""
    wait_for_heartbeat(supervisor)
    first = supervisor.worker_pid
    assert first is not None
    assert NO_GPU not in psutil.Process(first).environ()
    os.kill(first, signal.SIGABRT)
    wait_until(lambda: supervisor.worker_pid not in (None, first))
    assert psutil.Process(supervisor.worker_pid).environ()[NO_GPU] == "1"


def test_a_worker_without_a_heartbeat_is_replaced(
    supervisor: WorkerSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_heartbeat(supervisor)
    first = supervisor.worker_pid
    os.kill(first, signal.SIGSTOP)
    # Only the stopped worker has to hurry: its successor may start on a busy machine.
    patience = {first: 1.0}
    monkeypatch.setattr(
        WorkerSupervisor, "_patience", lambda self: patience.get(self.worker_pid, module.START_SECONDS)
    )
    wait_until(lambda: not psutil.pid_exists(first))
    wait_until(lambda: supervisor.worker_pid not in (None, first))
    wait_for_heartbeat(supervisor)
    assert supervisor.board.restarts == 1


def test_a_worker_that_starts_slowly_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(3)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with WorkerSupervisor() as supervisor:
        config = asdict(PrototypesConfig(sync=False, worker_timeout_seconds=1.0))
        supervisor.board.publish(WorkerSettings(0, 1, "", 1, 1, 1, 1, 0, EmbeddingRing.size(1, 1), config))
        wait_until(lambda: supervisor.board.started_worker)
        assert supervisor.board.restarts == 0
        assert supervisor.board.started_worker == supervisor.worker_pid


def test_a_worker_with_nothing_to_do_ends_and_stays_away(
    supervisor: WorkerSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BOARD, supervisor.path)
    decline_worker(Ranks("torchrun", rank=1, world_size=2, local_rank=1))  # not this rank's business
    wait_for_heartbeat(supervisor)
    decline_worker(Ranks("torchrun", rank=0, world_size=2, local_rank=0))
    wait_until(lambda: supervisor.worker_pid is None)
    assert supervisor.board.restarts == 0


def test_requests_to_save_do_not_end_the_worker(supervisor: WorkerSupervisor) -> None:
    wait_for_heartbeat(supervisor)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(supervisor.worker_pid, number)
    wait_for_heartbeat(supervisor)
    assert supervisor.board.restarts == 0


def test_closing_ends_a_worker_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.3)
    with WorkerSupervisor() as supervisor:
        wait_for_heartbeat(supervisor)
        worker = supervisor.worker_pid
        os.kill(worker, signal.SIGSTOP)  # SIGTERM waits for SIGCONT
    assert not psutil.pid_exists(worker)


def test_the_worker_dies_with_its_supervisor() -> None:
    program = (
        "from medvlp.prototypes.supervisor import WorkerSupervisor\n"
        "import time\n"
        "supervisor = WorkerSupervisor().start()\n"
        "started = time.monotonic_ns()\n"
        "while supervisor.board.last_heartbeat < started + 3e8: time.sleep(0.02)\n"
        "print(supervisor.worker_pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        worker = int(parent.stdout.readline())
        assert psutil.pid_exists(worker)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie")

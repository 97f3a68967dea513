"""A reusable pool of real processes joined by gloo, so that tests of several ranks start quickly."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
#: Seconds the other ranks get to end after one has failed; they usually wait in a collective for ever.
GRACE = 5.0
#: What a process that trains imports sooner or later, fifteen seconds of a core. Methods are parts of the
#: combination or imported with it, and DeepSpeed imports Muon (with torch's compiler) when an engine is made.
IMPORTED = [
    "medvlp.methods.combination.method",
    "medvlp.training.pretrain",
    "medvlp.evaluation.task",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "faiss",
    "pyarrow",
]
_ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_ENVIRONMENT = dict(os.environ) | _ON_CPU


class RankError(RuntimeError):
    """A function failed on some rank; the message holds the tracebacks, `errors` the exceptions' names."""

    def __init__(self, message: str, errors: dict[int, str]):
        super().__init__(message)
        self.errors = errors


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def imported() -> ForkServerContext:
    """Start method whose processes are forked from one that has imported `IMPORTED`, once for all tests.

    They have the environment in which this module was imported, on the CPU; what a test sets they do not see.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def _serve(rank: int, environment: dict[str, str], port: int, connection: Connection) -> None:
    gc.freeze()  # as a training does, for the first one and for what is no training
    sys.path.insert(0, str(ROOT))
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    world_size = int(environment["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, arguments = pickle.loads(message)
            answer = pickle.dumps((True, function(*arguments)))
        except BaseException as error:
            answer = pickle.dumps((False, (type(error).__name__, traceback.format_exc())))
        connection.send_bytes(answer)


class GlooPool:
    """`world_size` processes with one default gloo group, kept between calls of `run`.

    The functions given to `run` are module-level functions of test files (they travel by name) and must
    leave the default group alive. A pool whose ranks no longer agree is replaced at the next `run`.
    """

    def __init__(self, world_size: int, timeout: float = 280.0, environment: Mapping[str, str] | None = None):
        """Nothing starts before the first `run`.

        Args:
            world_size: number of processes. timeout: in seconds; bounds every `run`.
            environment: of the processes, over what keeps them on the CPU. With it they are spawned: modules
                may read it when they are imported.
        """
        self.world_size = world_size
        self.environment = environment or {}
        self.timeout = timeout
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._store: dist.TCPStore | None = None

    def _start(self) -> None:
        # Not daemons (data loaders need children), so an open pool would keep the interpreter from ending.
        atexit.register(self.close)
        # The ranks meet in this process: no file, whose size a test may limit, and no port to guess.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        } | dict(self.environment)
        context = multiprocessing.get_context("spawn") if self.environment else imported()
        with mock.patch.dict(os.environ, _ON_CPU | environment):
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                arguments = (rank, environment, self._store.port, theirs)
                process = context.Process(target=_serve, args=arguments, daemon=False)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank; return the results in rank order.

        Raises:
            RankError: with the traceback of every rank that failed, died or did not answer in time.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((function, arguments))
        for connection in self._connections:
            connection.send_bytes(message)
        answers = self._collect()
        failures = {rank: answer[1] for rank, answer in answers.items() if not answer[0]}
        if not failures:
            return [answers[rank][1] for rank in range(self.world_size)]
        errors = {rank: name for rank, (name, _) in failures.items()}
        if len(failures) < self.world_size or len(set(errors.values())) > 1:
            self.close()
        report = "\n".join(f"--- rank {rank}:\n{text}" for rank, (_, text) in sorted(failures.items()))
        raise RankError(f"{function.__qualname__} failed on ranks {sorted(failures)}\n{report}", errors)

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < self.world_size:
            pending = {c: rank for rank, c in enumerate(self._connections) if rank not in answers}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in pending.values():
                    answers[rank] = (False, ("TimeoutError", "no answer in time (waiting for another rank?)"))
            for connection in ready:
                rank = pending[connection]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(GRACE)
                    code = self._processes[rank].exitcode
                    answers[rank] = (False, ("ProcessDied", f"the process ended with code {code}"))
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def close(self) -> None:
        """End the processes; the next `run` starts new ones."""
        atexit.unregister(self.close)
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._connections = [], []
        self._store = None


#: The fixture `gloo_pool`: the pool of a world size.
Pools = Callable[[int], GlooPool]

"""Starts the ranks of one node, passes signals on to them, and returns their exit code."""

import dataclasses
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launcher.placement import Node
from launcher.slurm.attempts import note_node_exit
from medvlp import distributed
from medvlp.device import uses_cuda
from medvlp.lifetime import die_with
from medvlp.prototypes.supervisor import WorkerSupervisor
from medvlp.ranks import (
    FIRST_ERROR,
    LostPeerError,
    available_cpus,
    claim_first_error,
    first_error,
    refuse_lost_gpus,
)
from medvlp.training.hangs import announce_lost
from medvlp.training.interrupts import EXIT_INTERRUPTED
from shards.errors import MedvlpError, UsageError

logger = logging.getLogger(__name__)

#: Signals the ranks act on (they save a checkpoint and stop).
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
#: Those that torch takes too; they keep their meaning, so that `nohup` keeps a run.
_LEFT_ALONE = (signal.SIGHUP, signal.SIGQUIT)
#: Seconds between two looks at whether a rank has died.
_LOOK_SECONDS = 0.5
#: Where Linux tells of the NUMA nodes of a machine: its sockets, or parts of them.
_NUMA_NODES = Path("/sys/devices/system/node")
#: Tells a rank which process it must not outlive.
PARENT = "MEDVLP_LAUNCHER_PID"


def ranks_here(nproc: int | None) -> tuple[int, bool]:
    """Ranks of this machine, and whether they compute on GPUs.

    Args:
        nproc: as asked for; None: one a GPU, else one.

    Raises:
        UsageError: more than there are GPUs, of which NCCL takes one for each rank.
        LaunchError: Slurm gave this job GPUs here and torch finds none.
    """
    has_cuda = uses_cuda()
    gpus = torch.cuda.device_count() if has_cuda else 0
    if not has_cuda:
        refuse_lost_gpus()
    if nproc is not None and 0 < gpus < nproc:
        raise UsageError(
            f"--nproc {nproc}: this machine has {gpus} GPUs, and a rank needs one of its own; with "
            "DS_ACCELERATOR=cpu ranks compute on CPUs"
        )
    return nproc or gpus or 1, has_cuda


def launch(
    arguments: Sequence[str], ranks: int, has_cuda: bool, workers: bool = False, node: Node | None = None
) -> int:
    """Run `medvlp ARGUMENTS` once per rank with torchrun's process machinery, without restarts.

    When one rank fails the others of this node get SIGTERM, and SIGKILL half a minute later; the ranks of all
    nodes are told which one it was. The ranks of one node meet at a store of this process; those of several
    at the store of global rank 0 (torchrun's static rendezvous), so that nodes may start in any order.

    Args:
        arguments: command line of every rank, without the program.
        ranks: number of processes on this node, the same on every node.
        has_cuda: whether ranks compute on GPUs.
        workers: keep a cluster worker for them (`medvlp.prototypes.supervisor.uses_workers`).
        node: place of this machine in the run; default: it is alone.

    Returns:
        0, or the exit code of this node's first rank that ended otherwise (128 + signal for one that was
        killed). It is left for the job script too, which takes the first cause over all nodes.
    """
    node = node or Node()
    # The ranks have said what was wrong; torch would add a line about the exit code to it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        # In memory: nothing is left behind, however this process ends.
        descriptor = os.memfd_create("medvlp-first-error")
        stack.callback(os.close, descriptor)
        claim = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        shared = {FIRST_ERROR: str(claim)}
        if not node.port:
            _store, node, meeting = meet_here(node)  # which this frame keeps until the ranks have ended
            shared |= meeting
        if workers:
            shared |= stack.enter_context(WorkerSupervisor()).environment
        environments = {rank: rank_environment(rank, ranks, node, has_cuda) | shared for rank in range(ranks)}
        failures = _run_processes(arguments, environments, node, has_cuda)
        code = _exit_code(failures, first_error(claim))
    note_node_exit(node.index, code)
    return code


class _OnScreen(LogsSpecs):
    """Ranks write where their launcher does; torch's own class makes a folder for logs, and leaves it."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """No file for any rank."""
        return LogsDest(
            stdouts=dict.fromkeys(envs, ""),
            stderrs=dict.fromkeys(envs, ""),
            error_files=dict.fromkeys(envs, ""),
        )

    @property
    def root_log_dir(self) -> str:
        """There is none."""
        return ""


def _run_processes(
    arguments: Sequence[str], environments: dict[int, dict[str, str]], node: Node, has_cuda: bool
) -> list[ProcessFailure]:
    before = {number: signal.getsignal(number) for number in (*FORWARDED, *_LEFT_ALONE)}
    context: Any = start_processes(
        name="medvlp",
        entrypoint=sys.executable,
        args=dict.fromkeys(environments, ("-m", "launcher.main", *arguments)),
        envs=environments,
        logs_specs=_OnScreen(),
        **(_near_their_gpus() if has_cuda else {}),
    )
    processes = {
        int(environments[local]["RANK"]): handler.proc
        for local, handler in context.subprocess_handlers.items()
    }
    ended = threading.Event()
    watching = threading.Thread(target=announce_death, args=(processes, node, ended), daemon=True)
    watching.start()

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in context.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    # start_processes has put its own handlers, which kill the ranks after half a minute.
    for number, handler in before.items():
        signal.signal(number, forward if number in FORWARDED else handler)
    try:
        result = context.wait(period=0.1)
    finally:
        ended.set()
        context.close()
        # An evaluation goes on after its trainings: it must end at the next signal.
        for number, handler in before.items():
            signal.signal(number, handler)
    return [] if result is None else list(result.failures.values())


def _near_their_gpus() -> dict[str, Any]:
    """Bind each rank to the cores of its GPU's socket, where torch can (from 2.9, with numactl)."""
    try:
        from torch.numa.binding import AffinityMode, NumaOptions
    except ImportError:
        return {}
    sockets = len(list(_NUMA_NODES.glob("node[0-9]*")))
    if sockets < 2:
        return {}
    if shutil.which("numactl") is None:
        logger.warning(
            "ranks run on any core of %d NUMA nodes: numactl, by which torch binds each to its GPU's, is not "
            "installed",
            sockets,
        )
        return {}
    logging.getLogger("torch.numa.binding").addFilter(_shorten)
    return {"numa_options": NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)}


def _shorten(record: logging.LogRecord) -> bool:
    """One line in place of the two tracebacks with which torch says that a rank could not be bound."""
    if record.exc_info and record.exc_info[1] is not None:
        record.msg, record.args = f"a rank runs on any core: {record.exc_info[1]}", ()
        record.exc_info = record.exc_text = None
        return True
    return record.levelno < logging.WARNING


def announce_death(
    processes: Mapping[int, subprocess.Popen[bytes]], node: Node, ended: threading.Event
) -> None:
    """Wait for the first rank of this node that dies, and tell the ranks of all nodes.

    Under NCCL nothing else would: its collectives wait for a peer that is gone until they time out.

    Args:
        processes: by global rank. node: where the ranks meet. ended: nothing is to be waited for any more.
    """
    while not ended.wait(_LOOK_SECONDS):
        for rank, process in processes.items():
            code = process.poll()
            if code in (None, 0, EXIT_INTERRUPTED, LostPeerError.exit_code):
                continue
            assert code is not None
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            # With rank 0 of several nodes its store is gone, which tells the others as much.
            with suppress(RuntimeError):
                store = distributed.connect_store(node.address, node.port, timedelta(seconds=10))
                announce_lost(store, f"rank {rank} (node {node.index}), which {how}")
            return


def _exit_code(failures: list[ProcessFailure], shown: tuple[int, int] | None) -> int:
    """Of the ranks that failed; `shown`: local rank and code of the one that has shown its error."""
    if not failures:
        return 0
    # A rank that lost another one ends after it, yet may be noticed before it.
    causes = [failure for failure in failures if failure.exitcode != LostPeerError.exit_code]
    if not causes:
        print("error: the ranks lost the connection to each other", file=sys.stderr)
    first = min(causes or failures, key=lambda failure: failure.timestamp)
    if first.exitcode > 0:
        return int(first.exitcode)
    if shown is not None and first.local_rank == shown[0]:
        # It was still closing when another, which had lost it, had ended and so ended all.
        return shown[1]
    name = signal.Signals(-first.exitcode).name
    guess = " (out of memory?)" if name == "SIGKILL" else ""
    print(f"error: rank {first.local_rank} was killed by {name}{guess}", file=sys.stderr)
    return int(128 - first.exitcode)


def may_show_error(error: MedvlpError, environment: Mapping[str, str]) -> bool:
    """Whether this rank is the one to show its error: the first that did not just lose another rank."""
    if FIRST_ERROR in environment and isinstance(error, LostPeerError):
        return False
    return claim_first_error(environment, error.exit_code)


def rank_environment(rank: int, ranks: int, node: Node, has_cuda: bool) -> dict[str, str]:
    """Environment of one local rank: torchrun's variables, and settings libraries read at their import."""
    environment = {
        "RANK": str(node.index * ranks + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(node.count * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": node.address,
        "MASTER_PORT": str(node.port),
        PARENT: str(os.getpid()),
    }
    return dict(os.environ) | environment | library_environment(ranks, has_cuda, os.environ)


#: Names of the setting of torch's CUDA allocator: of today, and before torch 2.10.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def library_environment(ranks: int, has_cuda: bool, given: Mapping[str, str]) -> dict[str, str]:
    """DS_ACCELERATOR, OMP_NUM_THREADS and the CUDA allocator's kind, where the user has not set them."""
    settings = {"OMP_NUM_THREADS": str(max(1, available_cpus(given) // ranks))}
    if not has_cuda:
        settings["DS_ACCELERATOR"] = "cpu"
    elif not any(name in given for name in _ALLOCATOR):
        # Reports are of another length in every step: memory in fixed blocks falls into pieces.
        name = _ALLOCATOR[Version(metadata.version("torch")) < Version("2.10")]
        settings[name] = "expandable_segments:True"
    return {name: value for name, value in settings.items() if name not in given}


def meet_here(node: Node) -> tuple[Any, Node, dict[str, str]]:
    """A store for the ranks of a run on this machine alone, the node with its port, and what tells the ranks.

    A port that was only found free may be another program's when rank 0 has imported torch, seconds later;
    this one is held from now on. The ranks take it for the store of torchrun's agent.
    """
    store = distributed.host_store()
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return store, dataclasses.replace(node, port=store.port), agent


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_launcher(environment: Mapping[str, str]) -> None:
    """Ask Linux to kill this rank when its launcher dies, so that no orphan keeps writing the run folder."""
    if PARENT in environment:
        die_with(int(environment[PARENT]))

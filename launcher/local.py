"""Starts the ranks of one machine, passes signals on to them, and returns their exit code."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from medvlp.training.errors import LostPeerError
from shards.errors import MedvlpError

#: Signals the ranks act on (they save a checkpoint and stop).
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
#: Tells a rank which process it must not outlive.
PARENT = "MEDVLP_LAUNCHER_PID"
#: Path of the file that the first rank with an error makes; only that rank shows its error.
FIRST_ERROR = "MEDVLP_FIRST_ERROR"


def launch(arguments: Sequence[str], ranks: int, has_cuda: bool) -> int:
    """Run `medvlp ARGUMENTS` once per rank with torchrun's process machinery, without restarts.

    When one rank fails the others get SIGTERM, and SIGKILL half a minute later.

    Args:
        arguments: command line of every rank, without the program.
        ranks: number of processes on this machine.
        has_cuda: whether ranks compute on GPUs.

    Returns:
        0, or the exit code of the first rank that ended otherwise (128 + signal for one that was killed).
    """
    # The ranks have said what was wrong; torch would add a line about the exit code to it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="medvlp-launch-") as folder:
        port, first_error = free_port(), Path(folder) / "first-error"
        environments = {
            rank: rank_environment(rank, ranks, port, has_cuda) | {FIRST_ERROR: str(first_error)}
            for rank in range(ranks)
        }
        failures = _run_processes(arguments, environments)
    return _exit_code(failures)


def _run_processes(arguments: Sequence[str], environments: dict[int, dict[str, str]]) -> list[ProcessFailure]:
    context = start_processes(
        name="medvlp",
        entrypoint=sys.executable,
        args=dict.fromkeys(environments, ("-m", "launcher.main", *arguments)),
        envs=environments,
        logs_specs=DefaultLogsSpecs(redirects=Std.NONE),
    )

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in context.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    # start_processes has put its own handlers, which kill the ranks after half a minute.
    for number in FORWARDED:
        signal.signal(number, forward)
    try:
        result = context.wait(period=0.1)
    finally:
        context.close()
    return [] if result is None else list(result.failures.values())


def _exit_code(failures: list[ProcessFailure]) -> int:
    if not failures:
        return 0
    # A rank that lost another one ends after it, yet may be noticed before it.
    causes = [failure for failure in failures if failure.exitcode != LostPeerError.exit_code]
    if not causes:
        print("error: the ranks lost the connection to each other", file=sys.stderr)
    first = min(causes or failures, key=lambda failure: failure.timestamp)
    if first.exitcode > 0:
        return int(first.exitcode)
    name = signal.Signals(-first.exitcode).name
    print(f"error: rank {first.local_rank} was killed by {name} (out of memory?)", file=sys.stderr)
    return int(128 - first.exitcode)


def may_show_error(error: MedvlpError, environment: Mapping[str, str]) -> bool:
    """Whether this rank is the one to show its error: the first that did not just lose another rank."""
    if FIRST_ERROR not in environment:
        return True
    if isinstance(error, LostPeerError):
        return False
    try:
        Path(environment[FIRST_ERROR]).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk must not hide the message about it
        return True
    return True


def rank_environment(rank: int, ranks: int, port: int, has_cuda: bool) -> dict[str, str]:
    """Environment of one rank: torchrun's variables, and settings libraries read when they are imported."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT: str(os.getpid()),
    }
    return dict(os.environ) | environment | library_environment(ranks, has_cuda, os.environ)


def library_environment(ranks: int, has_cuda: bool, given: Mapping[str, str]) -> dict[str, str]:
    """DS_ACCELERATOR and OMP_NUM_THREADS, where the user has not set them."""
    settings = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    if not has_cuda:
        settings["DS_ACCELERATOR"] = "cpu"
    return {name: value for name, value in settings.items() if name not in given}


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_launcher(environment: Mapping[str, str]) -> None:
    """Ask Linux to kill this rank when its launcher dies, so that no orphan keeps writing the run folder."""
    if PARENT not in environment or not sys.platform.startswith("linux"):
        return
    import ctypes

    death_signal_option = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(death_signal_option, signal.SIGKILL)
    if os.getppid() != int(environment[PARENT]):  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)

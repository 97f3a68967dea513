"""The daemons of slurm/local-cluster: started apart from the terminal, noted in files, found and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(os.environ.get("MEDVLP_SLURM_DIR") or f"/tmp/medvlp-slurm-{os.getuid()}")
WAIT_SECONDS = 240.0


class ClusterError(Exception):
    """What went wrong, for the user."""


def started_at(pid: int) -> str | None:
    """Start time of a live process in clock ticks: with the id it names one process for ever."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def record_file(name: str) -> Path:
    return FOLDER / "run" / f"{name}.process"


def spawn(name: str, command: list[str], **variables: str) -> None:
    """Start a daemon apart from our terminal and note which process it is."""
    with (FOLDER / "log" / f"{name}.out").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | variables, cwd=FOLDER / "log",
        )  # fmt: skip
    record_file(name).write_text(f"{process.pid} {started_at(process.pid)}")


def pid_of(name: str) -> int | None:
    """The noted process, if it still is that one."""
    try:
        pid, started = record_file(name).read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid) if started_at(int(pid)) == started else None


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.extend(int(child) for child in task.read_text().split())
    return found


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} took longer than {seconds:g} s; see {FOLDER}/log")
        time.sleep(0.05)


def end(name: str, number: signal.Signals = signal.SIGTERM, seconds: float = 5.0) -> None:
    """End a noted process, by force after `seconds`."""
    for attempt in (number, signal.SIGKILL):
        pid = pid_of(name)
        if pid is None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, attempt)
        with contextlib.suppress(ClusterError):
            wait_until(lambda: pid_of(name) is None, name, seconds)
    record_file(name).unlink(missing_ok=True)

"""A real `medvlp pretrain` process with its ranks: started, watched, killed, always ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.drills.outcomes import DrillError

REPOSITORY = Path(__file__).resolve().parents[2]
#: Longest time one start may take before a drill gives it up, in seconds.
PATIENCE = 240.0
#: Set when the drills are to end early: whoever waits for a process then stops waiting.
stopping = threading.Event()
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """The environment of every command a drill starts; its ranks find their own free port."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return kept | settings | more


def medvlp(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a `medvlp` command to its end."""
    command = [sys.executable, "-m", "launcher.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=environment(), cwd=REPOSITORY
    )


class Pretraining:
    """`medvlp pretrain`; leaving the context kills whatever of it is still there.

    Args:
        folder: the run folder; the output of each start is appended to `<folder>.log`.
        overrides: `key=value` for the command line.
        ranks: for --nproc.
        prefix: a program that runs the command, for example strace.
        variables: more of the environment.
        placement: options that say which node of several this is.
    """

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str],
        ranks: int = 2,
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        placement: Sequence[str] = (),
    ):
        self.folder = folder
        self._is_rank = ranks == 1 and not placement  # one on its own needs no launcher
        self.log = folder.with_name("-".join([folder.name, *placement]).replace(":", "-") + ".log")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        command = [
            *prefix, sys.executable, "-m", "launcher.main", "pretrain", *overrides, f"run.dir={folder}",
            "--nproc", str(ranks), *placement,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY,
                env=environment(**(variables or {})),
            )  # fmt: skip
        self.started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def output(self) -> str:
        """What this start has printed so far."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def steps(self) -> int:
        """Steps in `metrics.jsonl`."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_until(self, condition: Callable[[], object], what: str, pause: float = 0.002) -> None:
        """Wait for something to happen while the process runs.

        Raises:
            DrillError: the process ended, or it takes too long.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                raise DrillError(f"ended with code {self.process.returncode} before {what}: {self.tail()}")
            if stopping.is_set():
                raise DrillError(f"interrupted before {what}")
            if time.monotonic() > deadline:
                raise DrillError(f"no {what} within {PATIENCE:.0f} s: {self.tail()}")
            time.sleep(pause)

    def wait_for_step(self, step: int) -> None:
        """Wait until `step` stands in `metrics.jsonl`."""
        self.wait_until(lambda: self.steps() >= step, f"step {step}")

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        if self._is_rank:
            return psutil.Process(self.process.pid)
        for child in self._family():
            if child.environ().get("RANK") == str(number) and "launcher.main" in child.cmdline():
                return child
        raise DrillError(f"rank {number} is not there")

    def data_workers(self, rank: int) -> list[psutil.Process]:
        """The forked loader processes of a rank, in the order of their start."""
        return [child for child in self.rank(rank).children() if "pretrain" in child.cmdline()]

    def worker(self) -> psutil.Process:
        """The cluster worker of this node."""
        for child in self._family():
            if "medvlp.prototypes.worker" in child.cmdline():
                return child
        raise DrillError("the cluster worker is not there")

    def kill(self) -> bool:
        """SIGKILL to launcher, ranks and data workers at once; whether the launcher was still running.

        The ranks are sessions of their own (torchrun's process machinery), so there is no one group to kill.
        """
        family = self._family()
        running = self.process.poll() is None
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(60)
        psutil.wait_procs(family, timeout=60)
        return running and self.process.returncode == -signal.SIGKILL

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for the end; the exit code.

        Raises:
            DrillError: it does not end.
        """
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if stopping.is_set():
                raise DrillError("interrupted before its end")
            if time.monotonic() > deadline:
                raise DrillError(f"did not end within {seconds:.0f} s: {self.tail()}")
            time.sleep(0.05)
        return self.process.returncode

    def finish(self) -> None:
        """Wait for an end with code 0.

        Raises:
            DrillError: another code.
        """
        code = self.end()
        if code != 0:
            raise DrillError(f"ended with code {code}: {self.tail()}")

    def tail(self) -> str:
        """The end of the output, for messages."""
        return self.output()[-300:]

    def _family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

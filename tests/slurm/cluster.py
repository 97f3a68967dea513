"""The local cluster as tests use it: submit, wait, read the run folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typer.testing import CliRunner

from launcher.main import app
from launcher.slurm import slurm_commands
from launcher.slurm.slurm_commands import Job

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "slurm" / "local-cluster"
#: Python in the ranks of a job finds `faults/sitecustomize.py` here.
FAULTS = Path(__file__).parent / "faults"
#: Bound of what is waited for, reached by nothing but a fault: machines may be busy.
PATIENCE = 900
Answer = TypeVar("Answer")
#: What the fixture `tiny` gives: the words behind `medvlp submit` for a run of a name.
Tiny = Callable[..., list[str]]


class Cluster:
    """A running cluster of three nodes.

    Attributes:
        folder: of its configuration and logs.
        small_disk: a file system of a few megabytes that all nodes see, or None where none can be mounted.
    """

    def __init__(self, folder: Path, small_disk: Path | None):
        self.folder = folder
        self.small_disk = small_disk

    def manage(self, *arguments: str) -> str:
        """Run slurm/local-cluster."""
        finished = subprocess.run(
            [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=PATIENCE
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def submit(self, *arguments: str) -> int:
        """`medvlp submit ARGUMENTS`; the job's id. Errors are raised as they are."""
        result = CliRunner().invoke(app, ["submit", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        match = re.search(r"submitted job (\d+)", result.output)
        assert match, result.output
        return int(match[1])

    def sbatch(self, script: str, *arguments: str) -> int:
        """Submit a plain script."""
        command = ["sbatch", "--parsable", *arguments, "--output=/dev/null", f"--wrap={script}"]
        return int(subprocess.check_output(command, text=True))

    def job(self, job_id: int) -> Job:
        """How a job stands."""
        (job,) = slurm_commands.list_jobs([job_id])
        return job

    def wait(self, what: str, condition: Callable[[], Answer | None], seconds: float = PATIENCE) -> Answer:
        """Poll until `condition` says something; its answer."""
        deadline = time.monotonic() + seconds
        while True:
            answer = condition()
            if answer:
                return answer
            if time.monotonic() > deadline:
                pytest.fail(f"no {what} within {seconds:g} s")
            time.sleep(0.2)

    def wait_for_end(self, job_id: int, run: Path | None = None, seconds: float = PATIENCE) -> Job:
        """The job once it is over; on the way out its log is printed for the report of a failure."""
        try:
            return self.wait(f"end of job {job_id}", lambda: self._over(job_id), seconds)
        finally:
            for log in sorted((run / "slurm").glob("job-*.out")) if run else []:
                print(log.read_text(errors="replace"))

    def _over(self, job_id: int) -> Job | None:
        job = self.job(job_id)
        return job if job.is_over else None

    def idle_nodes(self) -> int:
        """Nodes of the default partition that run nothing."""
        states = subprocess.check_output(["sinfo", "-h", "-N", "-p", "batch", "-o", "%T"], text=True)
        return states.split().count("idle")

    def wait_for_step(self, run: Path, step: int, seconds: float = PATIENCE) -> None:
        """Until the run has logged a step."""
        self.wait(f"step {step} of {run.name}", lambda: last_step(run) >= step, seconds)

    def wait_for_start(self, run: Path, count: int, seconds: float = PATIENCE) -> None:
        """Until the run's training has begun for the `count`-th time."""
        self.wait(f"start {count} of {run.name}", lambda: len(starts(run)) >= count, seconds)

    def wait_for_attempt(self, run: Path, count: int) -> None:
        """Until a run's batch script has started for the `count`-th time."""
        self.wait(f"attempt {count} of {run.name}", lambda: len(attempts(run)) >= count)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that may be growing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_step(run: Path) -> int:
    """The last logged step of a run; 0 before the first."""
    logged = lines(run / "metrics.jsonl")
    return int(logged[-1]["step"]) if logged else 0


def starts(run: Path) -> list[dict[str, Any]]:
    """The starts and resumes of a run."""
    return [event for event in lines(run / "events.jsonl") if event["kind"] in ("start", "resume")]


def attempts(run: Path) -> list[dict[str, Any]]:
    """The starts of a run's batch scripts."""
    return lines(run / "slurm" / "attempts.jsonl")

"""Ranks and data workers that are stopped or killed during `medvlp pretrain --nproc 2`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.drawn_once import phantoms
from tests.launcher.forked_command import ForkedCommand, environment
from tests.training.runs import TINY

#: Bounds of what is waited for, reached by nothing but a fault: machines may be busy.
PATIENCE = 400
#: Seconds after which a rank counts as hanging; a step takes a tenth of one on a quiet machine.
LIMIT = 10
pytestmark = [pytest.mark.dist, pytest.mark.timeout(3 * PATIENCE)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms") / "data", studies=60, image_size=64)


class Run:
    """A run that would take hours, after its first steps."""

    def __init__(
        self, data: Path, folder: Path, *more: str, steps: int = 3, ranks: int = 2, **variables: str
    ):
        self.folder, self.ranks = folder, ranks
        command = [
            "pretrain", *TINY, f"data.root={data}", f"run.dir={folder}", "train.steps=100000", *more,
            "--nproc", str(ranks),
        ]  # fmt: skip
        self.process = ForkedCommand(*command, environment=environment() | variables)
        deadline = time.monotonic() + PATIENCE
        while self.steps() < steps:
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                pytest.fail(f"no steps in time: {self.process.communicate()[0]}")
            time.sleep(0.1)

    def steps(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def rank(self, number: int) -> psutil.Process:
        if self.ranks == 1:
            return psutil.Process(self.process.pid)
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=psutil.Process.create_time)[number]

    def events(self) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def wait_for_event(self, kind: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while kind not in [event["kind"] for event in self.events()]:
            assert time.monotonic() < deadline, f"no event {kind!r}"
            time.sleep(0.1)

    def end(self) -> tuple[int, str, float]:
        """Exit code, output, and seconds until the end; far earlier than a step's time-out of 10 minutes."""
        started = time.monotonic()
        try:
            output = self.process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the job did not end: {self.process.communicate()[0]}")
        return self.process.returncode, output, time.monotonic() - started


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_ends_the_job(data, tmp_path, stopped):
    run = Run(data, tmp_path / "run", f"train.step_timeout_seconds={LIMIT}")
    os.kill(run.rank(stopped).pid, signal.SIGSTOP)
    if stopped == 0:  # goes on once it is named; the other has to be killed, half a minute later
        run.wait_for_event("hang")
        os.kill(run.rank(stopped).pid, signal.SIGCONT)
    code, output, seconds = run.end()
    print(f"rank {stopped} stopped: ended after {seconds:.1f} s")
    assert code == 7, output
    assert output.count("error: ") == 1, output
    # The store is the launcher's, so also a stopped rank 0 has left there where it was.
    assert f"rank {stopped} does not answer (last in" in output
    assert f"rank {1 - stopped} has waited {LIMIT} s (train.step_timeout_seconds)" in output
    assert [event["kind"] for event in run.events()] == ["start", "hang"]


def test_a_killed_rank_ends_the_job_at_once(data, tmp_path):
    run = Run(data, tmp_path / "run")
    os.kill(run.rank(1).pid, signal.SIGKILL)
    code, output, seconds = run.end()
    print(f"rank 1 killed: ended after {seconds:.1f} s")
    assert code == 128 + signal.SIGKILL, output
    assert "error: rank 1 was killed by SIGKILL" in output


def data_workers(rank: psutil.Process) -> list[psutil.Process]:
    """The forked children, which have their parent's command line."""
    return [child for child in rank.children() if child.cmdline() == rank.cmdline()]


# All numbers of ranks and workers are drilled: tests/drills/faults.py.
def test_a_killed_data_worker_is_named(data, tmp_path):
    run = Run(data, tmp_path / "run", "data.workers=2", ranks=1)
    victim = data_workers(run.rank(0))[-1]
    os.kill(victim.pid, signal.SIGKILL)
    code, output, seconds = run.end()
    print(f"data worker killed: ended after {seconds:.1f} s")
    assert code == 3, output
    assert output.count("error: ") == 1, output
    assert f"error: rank 0: data worker 1 (process {victim.pid}) was killed by SIGKILL" in output
    assert "lower data.workers" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_an_error_nobody_foresaw_in_a_data_worker_is_named(data, tmp_path, ranks, workers):
    poison = str(Path(__file__).parents[1] / "drills" / "poison")
    run = Run(
        data, tmp_path / "run", f"data.workers={workers}", steps=0, ranks=ranks,
        PYTHONPATH=poison, MEDVLP_DRILL_FAIL="40",
    )  # fmt: skip
    code, output, _ = run.end()
    assert code == 3, output
    assert output.count("error: ") == 1, output
    assert re.search(
        r"error: rank \d: (data worker \d \(process \d+\)|reading samples) failed: MemoryError in", output
    )
    assert "Traceback" not in output


def test_a_stopped_data_worker_does_not_keep_an_ending_run(data, tmp_path):
    run = Run(data, tmp_path / "run", "data.workers=2", ranks=1)
    stopped, victim = data_workers(run.rank(0))
    os.kill(stopped.pid, signal.SIGSTOP)
    os.kill(victim.pid, signal.SIGKILL)
    code, output, _ = run.end()
    assert code == 3, output
    assert f"(process {victim.pid}) was killed by SIGKILL" in output
    assert not psutil.pid_exists(stopped.pid)


def test_a_second_signal_ends_the_job_at_once(data, tmp_path):
    run = Run(data, tmp_path / "run", "checkpoint.every_steps=1")
    first, second = run.rank(0), run.rank(1)
    second.suspend()  # so that the first signal cannot be acted on
    run.process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert run.process.poll() is None
    # Two within a second of a rank's time are one request: on a busy machine the second may come too early.
    while first.is_running() and first.status() != psutil.STATUS_ZOMBIE:
        run.process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
    second.resume()
    code, output, _ = run.end()
    assert code == 128 + signal.SIGTERM, output
    saved = (tmp_path / "run/checkpoints/latest").read_text().strip()
    assert (tmp_path / "run/checkpoints" / saved / "manifest.json").is_file()


def test_the_end_of_the_time_saves_and_stops(data, tmp_path):
    run = Run(data, tmp_path / "run", "train.max_minutes=0.05", steps=0, ranks=1)
    code, output, _ = run.end()
    assert code == 75, output
    assert "stopped by train.max_minutes after a checkpoint" in output
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == f"step-{run.steps():08d}"
    told = [(event["kind"], event.get("by")) for event in run.events()]
    assert told == [("start", None), ("interrupt", "train.max_minutes")]


def test_a_run_folder_has_one_writer_and_outlives_it(data, tmp_path):
    first = Run(data, tmp_path / "run", ranks=2)
    holder = first.rank(0).pid
    code, output, _ = Run(data, tmp_path / "run", steps=0, ranks=2).end()
    assert code == 4, output
    assert output.count("error: ") == 1, output
    assert f"run.dir={tmp_path / 'run'} is being written by process {holder} of" in " ".join(output.split())
    first.process.kill()  # takes its ranks with it
    first.process.wait()
    time.sleep(0.5)
    steps = first.steps()
    time.sleep(1.5)
    assert first.steps() == steps
    code, output, _ = Run(data, tmp_path / "run", "train.max_minutes=0.01", steps=0, ranks=1).end()
    assert code == 75, output
    assert "sign of life" not in output
    assert steps >= 3

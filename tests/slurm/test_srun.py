"""Ranks that a user's own `srun` starts, without our job script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from medvlp.ranks import LostPeerError
from tests.slurm.cluster import PATIENCE, Cluster
from tests.training.runs import TINY

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * PATIENCE)]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_rank_is_named_on_the_other_node_of_srun(
    cluster: Cluster, data: Path, tmp_path: Path, dies: int
) -> None:
    """Srun leaves the other tasks alone where it is told so; with rank 0 goes the store in which they met."""
    run, survivor = tmp_path / "run", 1 - dies
    options = [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=2",
        "--time=10",
        "--kill-on-bad-exit=0",
        "--label",
    ]
    pretrain = [sys.executable, "-m", "launcher.main", "pretrain", *TINY]
    more = [f"data.root={data}", f"run.dir={run}", "train.steps=100000", "train.max_minutes=8"]
    with subprocess.Popen(
        ["srun", *options, *pretrain, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as step:
        try:
            cluster.wait_for_step(run, 2)
            rank_of(run, dies).kill()
            output = step.communicate(timeout=PATIENCE)[0]
        finally:
            step.terminate()
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    said = [line for line in output.splitlines() if line.startswith(f"{survivor}: error: ")]
    assert len(said) == 1, output
    assert f"rank {survivor} lost rank {dies} on " in said[0]
    assert f"task {survivor}: Exited with exit code {LostPeerError.exit_code}" in output


def rank_of(run: Path, number: int) -> psutil.Process:
    """The process that a task of srun is in; its data workers are others."""
    [found] = [
        process
        for process in psutil.process_iter()
        if f"run.dir={run}" in process.cmdline() and process.environ().get("SLURM_PROCID") == str(number)
    ]
    return found

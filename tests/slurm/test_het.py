"""A heterogeneous job: training in one component, the prototype server on a CPU node in the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.slurm import slurm_commands
from tests.slurm.cluster import PATIENCE, Cluster, Tiny, attempts
from tests.slurm.commands import listed, medvlp

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * PATIENCE)]


def test_the_prototype_server_runs_beside_the_training(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["train.steps=100000", "checkpoint.every_steps=20", "--nodes", "1"]
    job_id = cluster.submit(*tiny("run", *more, "--serve-prototypes", "--port 0", "--beside", "mem=2G"))
    log = run / f"slurm/job-{job_id}.out"
    cluster.wait("answers", lambda: log.exists() and re.search(r"serving version \d+ ", log.read_text()))
    assert re.search(rf"serving {run} at 127\.0\.0\.1:\d+", log.read_text())
    first, second = slurm_commands.list_jobs([job_id])
    assert {first.state, second.state} == {"RUNNING"}
    assert first.nodes != second.nodes
    rows = {row["job"]: row["kind"] for row in listed("jobs") if row["folder"] == str(run)}
    assert rows == {f"{job_id}+0": "pretrain", f"{job_id}+1": "beside"}
    assert "is saved" in medvlp("cancel", run)
    assert all(job.is_over for job in slurm_commands.list_jobs([job_id]))
    assert attempts(run)[-1]["exit_code"] == 75

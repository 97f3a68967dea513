"""`medvlp jobs`, `runs`, `logs`, `cancel` and `resume` on a job that trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.slurm import slurm_commands
from tests.slurm.cluster import PATIENCE, Cluster, Tiny, attempts, last_step
from tests.slurm.commands import listed, medvlp

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * PATIENCE)]


def test_a_run_is_watched_cancelled_and_resumed_on_more_nodes(
    cluster: Cluster, tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = cluster.submit(*tiny("run", "train.steps=100000", "checkpoint.every_steps=50", "--nodes", "1"))
    cluster.wait_for_step(run, 3)

    (row,) = [row for row in listed("jobs") if row["folder"] == str(run)]
    assert (row["job"], row["kind"], row["state"], row["restarts"]) == (str(first), "pretrain", "RUNNING", 0)
    assert row["step"] >= 3
    assert row["steps"] == 100000
    assert row["samples_per_second"] > 0
    assert row["eta_seconds"] > 0
    assert row["nodes"] == cluster.job(first).nodes
    assert "100000" in medvlp("jobs")
    assert [(found["name"], found["state"]) for found in listed("runs", tmp_path)] == [("run", "running")]
    lines = medvlp("logs", first, "-n", "3").splitlines()
    assert len(lines) == 3
    assert "/100000 epoch" in lines[-1]

    told = medvlp("cancel", run)
    (attempt,) = attempts(run)
    assert (attempt["decision"], attempt["exit_code"]) == ("stop", 75)
    assert "cancelled on request" in attempt["reason"]
    step = last_step(run)
    assert f"step {step} is saved" in told
    job = cluster.job(first)
    assert job.is_over
    assert job.restarts == 0
    assert [found["state"] for found in listed("runs", tmp_path)] == ["interrupted"]
    assert f"no job of {run} waits or runs" in medvlp("cancel", run)

    assert "submitted job" in medvlp("resume", run, f"train.steps={step + 4}", "--nodes", "2")
    second = slurm_commands.list_jobs()[-1]
    assert medvlp("logs", run, "-f").count(f"step {step + 4}/") == 1
    assert cluster.wait_for_end(second.id, run).state == "COMPLETED"
    assert second.nodes == "" or "," in second.nodes or "[" in second.nodes
    assert attempts(run)[-1]["decision"] == "done"
    (found,) = listed("runs", tmp_path)
    assert (found["state"], found["step"], found["checkpoint"]["step"]) == ("finished", step + 4, step + 4)
    rows = [(row["job"], row["step"]) for row in listed("jobs", run)]
    assert rows == [(str(first), step), (str(second.id), step + 4)]


def test_a_job_that_waits_is_cancelled_at_once(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    before = cluster.sbatch("sleep 600", "--begin=now+1hour")
    try:
        job_id = cluster.submit(*tiny("run", "--dependency", f"afterok:{before}"))
        assert [found["state"] for found in listed("runs", tmp_path)] == ["queued"]
        assert f"job {job_id} ended (pending before)" in medvlp("cancel", tmp_path / "run")
        assert cluster.wait_for_end(job_id).state == "CANCELLED"
    finally:
        slurm_commands.cancel(str(before))

"""`medvlp doctor` inside a job of two nodes, and before every start of a job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import PATIENCE, Cluster, Tiny, attempts

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * PATIENCE)]


def test_all_nodes_of_a_job_are_looked_at(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    options = f"--run-dir {tmp_path / 'run'} --data {data} --collective --json"
    command = f"{sys.executable} -m launcher.main doctor {options} > {tmp_path / 'report.json'}"
    job_id = cluster.sbatch(f"{command} 2> {tmp_path / 'errors'}", "--nodes=2", "--time=5")
    assert cluster.wait_for_end(job_id).state == "COMPLETED", (tmp_path / "errors").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    details = {finding["check"]: finding["detail"] for finding in report["findings"]}
    assert report["bad_nodes"] == []
    assert details["python"].startswith("2 nodes")
    assert details["shared storage"].startswith("2 nodes")
    assert details["clock"].startswith("2 nodes agree")
    assert details["all-reduce"].startswith("2 ranks on gloo")
    assert "shards; " in details["dataset"]
    assert "MaxTime" not in details["time limit"]
    assert not list(tmp_path.glob(".medvlp-doctor-*"))


def test_a_node_that_does_not_see_the_run_folder_is_left_out(
    cluster: Cluster, tiny: Tiny, tmp_path: Path
) -> None:
    if cluster.small_disk is None:
        pytest.skip("only nodes with file systems of their own can lose one (needs root's rights)")
    run = tmp_path / "run"
    run.mkdir()
    cluster.wait("three idle nodes", lambda: cluster.idle_nodes() == 3)
    cluster.manage("exec", "node2", "mount", "-t", "tmpfs", "tmpfs", str(run))
    try:
        job_id = cluster.submit(*tiny("run", "train.steps=2", "--preflight"))
        job = cluster.wait_for_end(job_id, run)
    finally:
        cluster.manage("exec", "node2", "umount", str(run))
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    bad, good = attempts(run)
    assert (bad["nodes"], bad["exit_code"], bad["decision"]) == ("node[1-2]", 10, "requeue")
    assert (good["nodes"], good["exit_code"], good["decision"]) == ("node[1,3]", 0, "done")
    log = (run / f"slurm/job-{job_id}.out").read_text()
    assert "bad nodes: node2 (shared storage: " in log

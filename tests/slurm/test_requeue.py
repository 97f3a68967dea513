"""Jobs that are warned, preempted, cancelled, lose a node or crash: saved and requeued, or stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from launcher.slurm import slurm_commands
from tests.slurm.cluster import FAULTS, PATIENCE, Cluster, Tiny, attempts, last_step, lines, starts

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * PATIENCE)]


def weights(run: Path) -> dict[str, Tensor]:
    saved = (run / "checkpoints/latest").read_text().strip()
    return load_file(run / "checkpoints" / saved / "weights.safetensors")


def manifests(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*/manifest.json"))


def wandb_ids(run: Path) -> set[str]:
    """Of the offline runs in the run folder, whose names end with the id."""
    return {folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")}


def decisions(run: Path) -> list[tuple[int | None, str | None]]:
    return [(line["exit_code"], line["decision"]) for line in attempts(run)]


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file: as long as it exists, steps of jobs submitted from now on take half a second longer."""
    file = tmp_path / "slow"
    file.touch()
    monkeypatch.setenv("MEDVLP_TEST_SLOW", str(file))
    return file


def wait_until_deaf(cluster: Cluster, log: Path, count: int) -> None:
    """Until so many tasks have said that they do not listen."""
    cluster.wait("training", lambda: log.exists() and log.read_text().count("deaf") >= count)


def update(job_id: int, **values: str) -> None:
    slurm_commands.update_job(str(job_id), **values)


def test_a_time_limit_and_two_warnings_change_nothing(
    cluster: Cluster, tiny: Tiny, tmp_path: Path, slow: Path
) -> None:
    """Interrupted three times, once by a true time limit, against a run that nobody interrupts."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Slurm's warning reaches data workers too, which must not die of it.
    options = ["train.steps=200", "monitor.wandb=offline", "data.workers=1", "--signal-seconds", "60"]
    job_id = cluster.submit(*tiny("parts", *options))
    cluster.wait_for_step(parts, 2)
    # A whole minute from now on, with time for the warning before it and to save on a busy machine: limits
    # are checked every half minute.
    minutes = int(time.time() - cluster.job(job_id).start_time + 100) // 60 + 1
    update(job_id, TimeLimit=str(minutes))
    cluster.wait("the time limit's requeue", lambda: decisions(parts)[0][1])
    update(job_id, TimeLimit="30")
    for start in (2, 3):
        cluster.wait_for_start(parts, start)
        cluster.wait_for_step(parts, starts(parts)[-1]["step"] + 2)
        slurm_commands.cancel(str(job_id), "--signal=USR1", "--batch")
        cluster.wait_for_attempt(parts, start + 1)
    slow.unlink()
    other = cluster.submit(*tiny("whole", *options))
    job = cluster.wait_for_end(job_id, parts)
    assert (job.state, job.restarts) == ("COMPLETED", 3)
    assert cluster.wait_for_end(other, whole).state == "COMPLETED"

    assert decisions(parts) == [(75, "requeue")] * 3 + [(0, "done")]
    assert [line["asked"] for line in attempts(parts)] == [True] * 3 + [False]
    first, second = weights(whole), weights(parts)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert [line["step"] for line in lines(parts / "metrics.jsonl")] == list(range(1, 201))
    assert len(wandb_ids(parts)) == 1
    assert len(list((parts / "wandb").glob("offline-run-*"))) == 4


def test_a_preempted_job_saves_gives_way_and_comes_back(
    cluster: Cluster, tiny: Tiny, tmp_path: Path, slow: Path
) -> None:
    run = tmp_path / "run"
    job_id = cluster.submit(*tiny("run", "train.steps=1000", "--partition", "low"))
    cluster.wait_for_step(run, 2)
    urgent = cluster.sbatch("sleep 3", "--partition=high", "--nodes=3", "--exclusive")
    assert cluster.wait_for_end(urgent).state == "COMPLETED"
    cluster.wait_for_start(run, 2)
    first = attempts(run)[0]
    assert first["asked"]
    assert (first["exit_code"], first["decision"]) in [(75, "requeue"), (75, "leave")]
    resumed = starts(run)[-1]
    assert resumed["kind"] == "resume"
    assert resumed["step"] == first["step"]

    # A plain scancel ends it for good.
    cluster.wait_for_step(run, resumed["step"] + 1)
    slurm_commands.cancel(str(job_id))
    job = cluster.wait_for_end(job_id, run)
    assert job.state == "CANCELLED"
    assert attempts(run)[-1]["decision"] in (None, "leave")


def test_a_job_that_is_preempted_before_its_training_begins_comes_back(
    cluster: Cluster, tiny: Tiny, tmp_path: Path
) -> None:
    """It ended as FAILED: bash dies of a signal for which the script has set no trap yet."""
    run, site = tmp_path / "run", tmp_path / "site.yaml"
    site.write_text(json.dumps({"setup": ["echo loading", "sleep 5"]}))
    job_id = cluster.submit(*tiny("run", "train.steps=2", "--partition", "low", "--cluster", str(site)))
    log = run / f"slurm/job-{job_id}.out"
    cluster.wait("the site's lines", lambda: log.exists() and "loading" in log.read_text())
    urgent = cluster.sbatch("sleep 1", "--partition=high", "--nodes=3", "--exclusive")
    assert cluster.wait_for_end(urgent).state == "COMPLETED"
    job = cluster.wait_for_end(job_id, run)
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    first, second = attempts(run)
    assert (first["asked"], first["exit_code"], second["decision"]) == (True, 75, "done")


def test_a_lost_node_costs_the_steps_since_the_checkpoint(
    cluster: Cluster, tiny: Tiny, tmp_path: Path, slow: Path
) -> None:
    run = tmp_path / "run"
    job_id = cluster.submit(*tiny("run", "train.steps=1000", "checkpoint.every_steps=3"))
    cluster.wait_for_step(run, 2)
    nodes = slurm_commands.host_names(cluster.job(job_id).nodes)

    # slurmd alone dies and comes back: the job does not notice.
    cluster.manage("kill-node", "--slurmd-only", nodes[1])
    cluster.wait_for_step(run, last_step(run) + 2)
    cluster.manage("start-node", nodes[1])
    cluster.wait("a saved step", lambda: manifests(run))

    cluster.manage("kill-node", nodes[1])
    subprocess.run(["scontrol", "update", f"node={nodes[1]}", "state=down", "reason=crash"], check=True)
    cluster.wait_for_start(run, 2)
    assert nodes[1] not in slurm_commands.host_names(cluster.job(job_id).nodes)
    resumed = starts(run)[-1]
    assert resumed["kind"] == "resume"
    assert resumed["step"] >= 3
    assert resumed["step"] % 3 == 0
    assert attempts(run)[1]["restart"] == 1
    slurm_commands.cancel(str(job_id))
    cluster.wait_for_end(job_id, run)
    cluster.manage("start-node", nodes[1])
    subprocess.run(["scontrol", "update", f"node={nodes[1]}", "state=resume"], check=True)
    cluster.wait("all nodes", lambda: cluster.idle_nodes() == 3)


def test_a_crash_at_the_same_step_is_not_tried_a_third_time(
    cluster: Cluster, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("MEDVLP_TEST_ABORT", "3")
    job_id = cluster.submit(*tiny("run", "train.steps=6"))
    job = cluster.wait_for_end(job_id, run)
    assert (job.state, job.restarts) == ("FAILED", 1)
    assert decisions(run) == [(134, "requeue"), (134, "stop")]
    assert attempts(run)[-1]["reason"] == "failed twice at step 2: killed by SIGABRT (code 134)"


def test_ranks_that_do_not_save_in_time_are_ended_before_the_limit(
    cluster: Cluster, tiny: Tiny, tmp_path: Path
) -> None:
    run, site = tmp_path / "run", tmp_path / "site.yaml"
    program = [sys.executable, str(FAULTS / "stubborn.py")]
    site.write_text(json.dumps({"command": program}))
    options = ["--cluster", str(site), "--time", "2", "--signal-seconds", "60", "--max-requeues", "0"]
    job_id = cluster.submit(*tiny("run", *options))
    wait_until_deaf(cluster, run / f"slurm/job-{job_id}.out", 2)
    job = cluster.wait_for_end(job_id, run)
    assert (job.state, job.restarts) == ("FAILED", 0)
    (attempt,) = attempts(run)
    assert (attempt["asked"], attempt["exit_code"], attempt["decision"]) == (True, None, "stop")
    assert "did not save in the time left" in attempt["reason"]
    assert "already requeued 0 times (max_requeues)" in attempt["reason"]

"""`medvlp submit` on a real Slurm: what runs, what is refused, and what a job that cannot go on leaves."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.main import app
from launcher.slurm import slurm_commands
from launcher.slurm.slurm_commands import SlurmError
from launcher.slurm.submit import SubmitError
from medvlp.config_files import ConfigError
from tests.slurm.cluster import PATIENCE, REPOSITORY, Cluster, Tiny, attempts, lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * PATIENCE)]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["submit", *arguments])


def fill(file: Path) -> None:
    """Until the disk takes nothing more."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def test_two_nodes_of_two_ranks_train_and_finish(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job_id = cluster.submit(*tiny("run", "--ranks-per-node", "2"))
    with pytest.raises(SubmitError, match=rf"job {job_id} of .* is .*--dependency afterany:{job_id}"):
        cluster.submit(*tiny("run", "--ranks-per-node", "2"))
    job = cluster.wait_for_end(job_id, run)
    assert job.state == "COMPLETED"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 4
    saved = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    assert json.loads((saved / "manifest.json").read_text())["world_size"] == 4
    (attempt,) = attempts(run)
    assert (attempt["job_id"], attempt["exit_code"], attempt["step"]) == (job_id, 0, 4)
    assert (attempt["decision"], attempt["nodes"]) == ("done", job.nodes)
    (line,) = lines(run / "slurm/jobs.jsonl")
    assert (line["job_id"], line["kind"], line["ranks"]) == (job_id, "pretrain", 4)
    assert (run / f"slurm/job-{job_id}.out").is_file()
    assert not list((run / "slurm/exits").iterdir())


def test_mistakes_are_told_before_anything_is_submitted(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    for more, error, message in [
        (["optimizer.rate=1"], ConfigError, "unknown key"),
        (["train.global_batch=15"], ConfigError, "does not divide over 2 ranks"),
        (["precision=fp16"], ConfigError, "needs a CUDA device"),
        (["run.dir=/proc/run"], SubmitError, "choose another run.dir"),
        (["--partition", "nowhere"], SlurmError, "invalid partition"),
        (
            ["--gpus-per-node", "9", "--ranks-per-node", "1"],
            SlurmError,
            "node configuration is not available",
        ),
    ]:
        result = invoke(*tiny("run", *more))
        assert isinstance(result.exception, error), result.output
        assert message in str(result.exception)
    assert all(job.is_over for job in slurm_commands.list_jobs())  # Slurm lists what it refused
    assert not lines(tmp_path / "run/slurm/jobs.jsonl")


def test_an_error_of_the_ranks_ends_the_job_once(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    job_id = cluster.submit(*tiny("run", "data.root=/nowhere"))
    job = cluster.wait_for_end(job_id, tmp_path / "run")
    assert (job.state, job.restarts) == ("FAILED", 0)
    (attempt,) = attempts(tmp_path / "run")
    assert (attempt["exit_code"], attempt["decision"]) == (3, "stop")
    log = (tmp_path / f"run/slurm/job-{job_id}.out").read_text()
    assert "data folder /nowhere does not exist" in log
    assert "another start would not help" in log


def test_a_full_disk_ends_the_job_with_its_earlier_checkpoint(
    cluster: Cluster, tiny: Tiny, tmp_path: Path
) -> None:
    if cluster.small_disk is None:
        pytest.skip("needs the right to mount a small file system")
    run = cluster.small_disk / "run"
    ballast = cluster.small_disk / "ballast"
    site = tmp_path / "site.yaml"
    site.write_text("sbatch: {extra: [--hold]}\n")
    job_id = cluster.submit(*tiny("run", f"run.dir={run}", "train.steps=2", "--cluster", str(site)))
    ballast.write_bytes(bytes(2_500_000))
    subprocess.run(["scontrol", "release", str(job_id)], check=True)
    job = cluster.wait_for_end(job_id, run)
    assert (job.state, job.restarts) == ("FAILED", 0)
    assert [line["decision"] for line in attempts(run)] == ["stop"]
    assert "No space left on device" in (run / f"slurm/job-{job_id}.out").read_text()
    shutil.rmtree(run)
    ballast.unlink()


def test_a_run_folder_that_is_full_at_the_start_starts_nothing(
    cluster: Cluster, tiny: Tiny, tmp_path: Path
) -> None:
    if cluster.small_disk is None:
        pytest.skip("needs the right to mount a small file system")
    run, ballast = cluster.small_disk / "held", cluster.small_disk / "ballast"
    site = tmp_path / "site.yaml"
    site.write_text("sbatch: {extra: [--hold]}\n")
    job_id = cluster.submit(*tiny("held", f"run.dir={run}", "--cluster", str(site)))
    fill(ballast)
    subprocess.run(["scontrol", "release", str(job_id)], check=True)
    job = cluster.wait_for_end(job_id)
    assert (job.state, job.restarts) == ("FAILED", 0)
    shown = subprocess.check_output(["scontrol", "show", "job", str(job_id)], text=True)
    assert "ExitCode=4:0" in shown, shown
    ballast.unlink()
    shutil.rmtree(run)


def test_the_large_example_passes_shellcheck_and_slurm(cluster: Cluster, tiny: Tiny, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    script = tmp_path / "large.sbatch"
    example = str(REPOSITORY / "configs/clusters/8xh100.yaml")
    arguments = [
        *tiny(
            "large", "train.global_batch=1024", "--nodes", "16", "--gpus-per-node", "8", "--time", "2-0:0:0"
        ),
        *("--cluster", example, "--partition", "large", "--cpus-per-task", "96", "--dry-run"),
    ]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "large").exists()
    script.write_text(result.output)
    checked = subprocess.run(["shellcheck", "--severity=info", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert "using 1536 processors on nodes big[01-16]" in slurm_commands.check_script(script)
    script.write_text(result.output.replace("--nodes=16", "--nodes=17"))
    with pytest.raises(SlurmError, match="not available"):
        slurm_commands.check_script(script)

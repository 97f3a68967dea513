"""Answers of Slurm's programs: from a running cluster, and in the form that newer versions give them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.slurm import accounting, slurm_commands
from launcher.slurm.slurm_commands import SlurmError
from shards.errors import UsageError
from tests.slurm.cluster import Cluster

#: Slurm 22.05 writes numbers and states plainly; 23.11 and later as below, with the same names.
PLAIN = {
    "job_id": 7, "name": "a", "job_state": "RUNNING", "state_reason": "None", "nodes": "n[1-2]",
    "restart_cnt": 2, "partition": "p", "user_name": "me", "time_limit": 60, "submit_time": 10,
    "start_time": 20, "end_time": 30, "array_job_id": 0, "array_task_id": None,
    "het_job_id": 0, "standard_output": "/out", "comment": "",
}  # fmt: skip


def number(value: object, infinite: bool = False) -> dict[str, object]:
    return {"set": value is not None, "infinite": infinite, "number": value or 0}


def test_both_forms_of_the_json_are_one_job() -> None:
    newer = PLAIN | {
        "job_state": ["RUNNING"],
        "array_task_id": number(None),
        **{name: number(PLAIN[name]) for name in ("time_limit", "submit_time", "start_time", "end_time")},
        **{name: number(0) for name in ("array_job_id", "het_job_id")},
    }
    job = slurm_commands._job(PLAIN)
    assert slurm_commands._job(newer) == job
    assert (job.id, job.restarts, job.time_limit_minutes, job.array_job_id, job.is_over) == (
        7,
        2,
        60,
        None,
        False,
    )
    ending = slurm_commands._job(
        newer | {"job_state": ["CANCELLED", "COMPLETING"], "time_limit": number(0, True)}
    )
    assert (ending.state, ending.flags, ending.is_over) == ("CANCELLED", ("COMPLETING",), True)
    assert ending.time_limit_minutes is None


def test_past_runs_are_read() -> None:
    run = accounting._past_run(
        ["24_2", "a", "CANCELLED by 0", "0:15", "n1", "2026-01-01T00:00:00", "Unknown"]
    )
    assert (run.state, run.exit_code) == ("CANCELLED", 128 + 15)
    assert accounting._past_run(["1", "a", "FAILED", "3:0", "n1", "x", "y"]).exit_code == 3
    assert accounting._past_run(["1", "a", "PENDING", "", "", "x", "y"]).exit_code is None


def test_without_slurm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert not slurm_commands.is_installed()
    with pytest.raises(SlurmError, match="sbatch is not installed here: run this on a login node"):
        slurm_commands.run_command(["sbatch", "--version"])
    assert slurm_commands.node_address("node1") is None


def test_a_script_stands_above_the_variables_of_sbatch() -> None:
    script = "#SBATCH --time=5\n#SBATCH --gpus-per-node=2\n#SBATCH --requeue\n#SBATCH hetjob\nexport --x\n"
    said = {
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_GPUS_PER_NODE": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_WAIT": "1",
        "SLURM_MEM_PER_NODE": "700",  # of a surrounding `salloc`
        "SLURM_JOB_ID": "3",
    }
    kept = {"SBATCH_ACCOUNT": "a", "SBATCH_X": "1", "HOME": "/h", "SLURM_CONF": "/etc/slurm.conf"}
    assert slurm_commands.submission_environment(script, said | kept) == kept


def test_a_name_that_is_not_utf8_is_read() -> None:
    assert slurm_commands.run_command(["printf", r"caf\351"]) == "caf\ufffd"


@pytest.mark.parametrize(
    ("answer", "text"), [("[]", "TypeError"), ("{}", "KeyError"), ("{", "JSONDecodeError")]
)
def test_an_answer_that_cannot_be_read_is_an_error_of_slurm(
    monkeypatch: pytest.MonkeyPatch, answer: str, text: str
) -> None:
    monkeypatch.setattr(slurm_commands, "run_command", lambda _: answer)
    with pytest.raises(SlurmError, match=text):
        slurm_commands.list_jobs()


@pytest.mark.parametrize(("private", "over"), [("none", True), ("accounts,jobs", None), ("all", None)])
def test_a_job_that_may_be_hidden_is_not_called_over(
    monkeypatch: pytest.MonkeyPatch, private: str, over: bool | None
) -> None:
    config = f"Configuration data\nClusterName             = c\nPrivateData             = {private}\n"
    answers = {"scontrol": config, "squeue": '{"jobs": []}'}
    monkeypatch.setattr(slurm_commands, "run_command", lambda command: answers[command[0]])
    monkeypatch.setattr(slurm_commands, "is_installed", lambda: True)
    assert slurm_commands.job_is_over("c/9", os.getuid() + 1) is over
    assert slurm_commands.job_is_over("c/9", os.getuid()) is True  # one's own is shown
    assert slurm_commands.job_is_over("other/9", os.getuid()) is None


def test_a_job_in_another_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command would have found it."""
    script, asked = tmp_path / "job.sbatch", []
    script.write_text("#!/bin/bash\n")
    answers = {"sbatch": "12;own\n", "scontrol": "ClusterName = own\n", "scancel": ""}

    def run_command(command: list[str], environment: object = None) -> str:
        asked.append(command)
        return answers[command[0]]

    monkeypatch.setattr(slurm_commands, "run_command", run_command)
    assert slurm_commands.submit(script) == 12
    answers["sbatch"] = "12;other\n"
    with pytest.raises(SlurmError, match="job 12 to cluster other, where it was cancelled"):
        slurm_commands.submit(script)
    assert asked[-1] == ["scancel", "--clusters=other", "12"]
    answers["sbatch"] = "12\n"
    for name in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "other")
        with pytest.raises(UsageError, match=f"{name}=other"):
            slurm_commands.submit(script)
        monkeypatch.setenv(name, "own")
        assert slurm_commands.submit(script) == 12
        monkeypatch.delenv(name)


def test_slurm_is_asked_about_the_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    monkeypatch.setenv("SLURM_CONF", "/here")
    shown = slurm_commands.run_command(["env"]).splitlines()
    assert "SLURM_CONF=/here" in shown
    assert not [line for line in shown if line.startswith("SLURM_CLUSTERS")]
    assert slurm_commands.run_command(["env"], {"SBATCH_CLUSTERS": "other", "A": "b"}) == "A=b\n"


@pytest.mark.slurm
def test_a_job_is_what_its_script_says(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PARTITION", "high"), ("TIMELIMIT", "1"), ("NO_REQUEUE", "1"), ("QOS", "normal")):
        monkeypatch.setenv(f"SBATCH_{name}", value)
    options = ("partition=low", "time=7", "requeue", "hold", "output=/dev/null")
    script = tmp_path / "job.sbatch"
    script.write_text("\n".join(["#!/bin/bash", *(f"#SBATCH --{option}" for option in options), "true\n"]))
    job_id = slurm_commands.submit(script)
    try:
        job = cluster.job(job_id)
        assert (job.partition, job.time_limit_minutes) == ("low", 7)
        shown = subprocess.check_output(["scontrol", "show", "job", str(job_id)], text=True)
        assert "Requeue=1" in shown
    finally:
        slurm_commands.cancel(str(job_id))


@pytest.mark.slurm
def test_a_running_cluster_answers(cluster: Cluster) -> None:
    job_id = cluster.sbatch("exit 5", "--nodes=2", "--comment=a word")
    job = cluster.wait_for_end(job_id)
    assert (job.state, job.comment, job.time_limit_minutes) == ("FAILED", "a word", 60)
    assert len(slurm_commands.host_names(job.nodes)) == 2
    assert slurm_commands.list_jobs([job_id], user=job.user) == [job]
    assert slurm_commands.has_ended(job_id)
    assert slurm_commands.has_ended(999999)
    array = cluster.sbatch("exit 0", "--hold", "--array=3-5")
    assert not any(slurm_commands.has_ended(array, task) for task in (None, 3, 4, 5))
    slurm_commands.cancel(f"{array}_4")
    cluster.wait("its end", lambda: slurm_commands.has_ended(array, 4))
    assert not slurm_commands.has_ended(array)
    slurm_commands.cancel(str(array))
    cluster.wait("the end of all", lambda: slurm_commands.has_ended(array))
    (run,) = cluster.wait("the record", lambda: accounting.past_runs(job_id))
    assert (run.state, run.nodes) == ("FAILED", job.nodes)
    assert slurm_commands.configuration()["MULTIPLE_SLURMD"] == "Yes"
    assert str(slurm_commands.node_address("node1")).startswith("127.")
    with pytest.raises(SlurmError, match="Invalid job id"):
        slurm_commands.requeue("999999")

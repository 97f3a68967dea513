"""Jobs beside each other: tasks of an array, a training and the servers of its run, submissions for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.commands import runs
from launcher.run_state import RunState, read_run
from launcher.slurm import accounting, cancelling, run_jobs, slurm_commands
from launcher.slurm.accounting import PastRun
from launcher.slurm.attempts import AttemptError, end_attempt, start_attempt
from launcher.slurm.slurm_commands import Job, SlurmError
from launcher.slurm.submit import SubmitError, refuse_second_job
from medvlp.runs.events import EventLog
from tests.launcher.test_slurm_views import JOB, medvlp, own_job, submitted


def test_what_slurm_has_forgotten_of_an_array_is_shown_task_by_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last task's state was taken for the array's, and the other tasks for restarts of it."""
    run = submitted(
        tmp_path / "run",
        {"job_id": 9, "kind": "evaluate", "tasks": 3},
        {"job_id": 20, "kind": "evaluate", "tasks": 3},
        {"job_id": 30, "kind": "pretrain"},
        {"job_id": 40, "kind": "pretrain"},
    )

    def past(label: str, state: str) -> PastRun:
        return PastRun(label, "x", state, 0, "n1", "", "")

    records = {
        9: [past("9_0", "FAILED"), past("9_1", "COMPLETED"), past("9_2", "COMPLETED")],
        20: [past("20_0", "FAILED"), past("20_1", "RUNNING"), past("20_[2]", "PENDING")],
        30: [past("30+0", "NODE_FAIL"), past("30+1", "NODE_FAIL"), past("30+0", "FAILED")],
        40: [],
    }
    known = [
        replace(own_job(run), id=21, array_job_id=20, array_task_id=1),
        replace(own_job(run), id=20, state="PENDING", array_job_id=20, array_tasks="2"),
    ]
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: known)
    monkeypatch.setattr(accounting, "past_runs", records.__getitem__)
    rows = json.loads(medvlp("jobs", run, "--json").output)
    assert [(row["job"], row["kind"], row["state"], row["restarts"]) for row in rows] == [
        ("9_0", "evaluate", "FAILED", 0),
        ("9_1", "evaluate", "COMPLETED", 0),
        ("9_2", "evaluate", "COMPLETED", 0),
        ("20_1", "evaluate", "RUNNING", 0),
        ("20_[2]", "evaluate", "PENDING", 0),
        ("20_0", "evaluate", "FAILED", 0),
        ("30+0", "pretrain", "FAILED", 1),
        ("30+1", "beside", "NODE_FAIL", 0),
        ("40", "pretrain", "UNKNOWN", 0),
    ]


def test_a_run_runs_while_it_is_trained_not_while_it_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted(
        tmp_path / "run", {"job_id": 12, "kind": "prototypes"}, {"job_id": 13, "kind": "pretrain"}
    )
    (run / "config.yaml").write_text("")
    EventLog(run).note("finish", 10)
    monkeypatch.setattr(slurm_commands, "is_installed", lambda: True)
    for job, state in (
        (own_job(run), "finished"),
        (replace(own_job(run), state="PENDING"), "finished"),
        (replace(own_job(run), id=13), "running"),
        (replace(own_job(run), id=13, state="PENDING"), "queued"),
    ):
        monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None, of=job: [of])
        (row,) = json.loads(medvlp("runs", tmp_path, "--json").output)
        assert row["state"] == state


def test_a_run_of_somebody_else_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "theirs"):
        (submitted(tmp_path / name) / "config.yaml").write_text("")

    def read(path: Path, *more: object) -> RunState:
        if path.name == "theirs":
            raise PermissionError(13, "Permission denied", str(path / "config.yaml"))
        return read_run(path)

    monkeypatch.setattr(runs, "read_run", read)
    result = medvlp("runs", tmp_path)
    assert result.exit_code == 0, result.exception
    assert "mine" in result.output
    assert f"left out, {tmp_path}/theirs/config.yaml cannot be read: Permission denied" in result.output


@pytest.mark.parametrize("named", ["9", "9_1", "9_5"])
def test_a_task_of_an_array_is_meant_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    run = submitted(tmp_path / "run", {"job_id": 9, "kind": "evaluate"})
    tasks = [replace(own_job(run), id=9 + task, array_job_id=9, array_task_id=task) for task in range(2)]
    waiting = replace(own_job(run), id=12, state="PENDING", array_job_id=9, array_tasks="3,5-6%2")
    cancelled: list[str] = []
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: [*tasks, waiting])
    monkeypatch.setattr(slurm_commands, "cancel", lambda job_id, *more: cancelled.append(job_id))
    for task in range(7):
        (run / f"slurm/job-9_{task}.out").write_text(f"task {task}\n")
    result = medvlp("cancel", named)
    assert result.exit_code == 0, result.exception
    assert cancelled == [named]
    assert f"job {named} ended" in result.output
    shown = medvlp("logs", named).output.splitlines()
    assert ("task 0" in shown, "task 1" in shown) == (named == "9", named in ("9", "9_1"))
    with pytest.raises(run_jobs.UnknownJobError, match="does not know job 9_4"):
        run_jobs.find("9_4")


def test_a_second_evaluation_takes_no_parts_from_one_that_is_not_joined_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted(tmp_path / "run", {"job_id": 9, "kind": "evaluate"}, {"job_id": 12, "kind": "compare"})
    (run / "config.yaml").write_text("")
    (run / "evaluation-parts").mkdir()
    (run / "evaluation-parts/retrieval.json").write_text("{}")
    words = ["submit", "evaluate", run, "--task", "zero-shot"]
    waiting = replace(own_job(run), state="PENDING", array_job_id=9, name="medvlp-evaluate-run")
    for job, named in ((waiting, "job 9"), (own_job(run), "job 12")):
        monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None, of=job: [of])
        refused = medvlp(*words).exception
        assert isinstance(refused, SubmitError)
        assert named in str(refused)
        assert (run / "evaluation-parts/retrieval.json").exists()
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: [])
    monkeypatch.setattr(slurm_commands, "submit", lambda script: 20)
    assert medvlp(*words).exit_code == 0
    assert not (run / "evaluation-parts/retrieval.json").exists()


def evaluated(folder: Path, *lines: dict[str, object]) -> Path:
    """A run with jobs, and a part of an evaluation that is not joined."""
    run = submitted(folder, *lines)
    (run / "config.yaml").write_text("")
    (run / "evaluation-parts").mkdir()
    (run / "evaluation-parts/zero-shot.json").write_text("{}")
    return run


@pytest.mark.parametrize("named", ["B", "B A", "C B"])
def test_parts_of_a_run_that_stands_in_another_runs_array_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    runs = {name: evaluated(tmp_path / name) for name in "ABC"}
    known: list[Job] = []
    answers = iter([20, 21, 30, 31])
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: known)
    monkeypatch.setattr(slurm_commands, "submit", lambda script: next(answers))
    assert medvlp("submit", "evaluate", runs["A"], runs["B"], "--task", "zero-shot").exit_code == 0
    part = runs["B"] / "evaluation-parts/zero-shot.json"
    part.write_text("{}")
    words = ["submit", "evaluate", *(runs[name] for name in named.split()), "--task", "retrieval"]
    array = replace(own_job(runs["A"]), id=23, array_job_id=20, array_task_id=1)
    comparing = replace(own_job(runs["A"]), id=21, state="PENDING")
    for job in (array, comparing):
        known[:] = [job]
        refused = medvlp(*words).exception
        assert isinstance(refused, SubmitError)
        assert f"job {run_jobs.submitted_id(job)} (run), an evaluation of {runs['B']}" in str(refused)
        assert part.exists()
    known[:] = [
        replace(array, standard_output=str(tmp_path / "X/slurm/job-%j.out"))
    ]  # the id was given again
    assert medvlp(*words).exit_code == 0
    assert not part.exists()


def test_parts_stay_where_slurm_refuses_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = evaluated(tmp_path / "run")

    def submit(script: Path) -> int:
        assert not (run / "evaluation-parts/zero-shot.json").exists()
        raise SlurmError("sbatch: invalid partition")

    monkeypatch.setattr(slurm_commands, "submit", submit)
    assert isinstance(medvlp("submit", "evaluate", run, "--task", "retrieval").exception, SlurmError)
    assert [path.name for path in (run / "evaluation-parts").iterdir()] == ["zero-shot.json"]


def test_an_id_that_is_another_job_by_now_is_none_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept the run from being submitted, and could not be cancelled; its state was shown as the run's."""
    run = submitted(
        tmp_path / "run", {"job_id": 12, "kind": "pretrain"}, {"kind": "pretrain"}, {"job_id": "x"}
    )
    for output in (tmp_path / "slurm-12.out", tmp_path / "other/slurm/job-12.out"):
        foreign = replace(own_job(run), standard_output=str(output))
        monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None, of=foreign: [of])
        refuse_second_job(run)
        (row,) = json.loads(medvlp("jobs", run, "--json").output)
        assert (row["job"], row["state"], row["nodes"]) == ("12", "UNKNOWN", "")
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: [own_job(run)])
    with pytest.raises(SubmitError, match=r"job 12 of .* is running"):
        refuse_second_job(run)


def test_a_job_keeps_its_config_whatever_is_submitted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scripts = tmp_path / "run", []
    answers = iter([7, SlurmError("sbatch: invalid partition"), 8])

    def sbatch(script: Path) -> int:
        scripts.append(script.read_text())
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def steps(script: str) -> int:
        """`train.steps` of the config that a job reads."""
        (file,) = {word for word in script.split() if word.endswith(".yaml")}
        return int(yaml.safe_load(Path(file).read_text())["train"]["steps"])

    monkeypatch.setattr(slurm_commands, "submit", sbatch)
    words = ["submit", "data.root=/d", f"run.dir={run}", "train.global_batch=8", "--gpus-per-node", "0",
             "precision=fp32"]  # fmt: skip
    assert medvlp(*words, "train.steps=1").exit_code == 0
    refused = medvlp(*words, "train.steps=2", "--dependency", "afterany:7")
    assert isinstance(refused.exception, SlurmError)
    assert yaml.safe_load((run / "slurm/config.yaml").read_text())["train"]["steps"] == 1
    assert medvlp(*words, "train.steps=3", "--dependency", "afterany:7").exit_code == 0
    assert yaml.safe_load((run / "slurm/config.yaml").read_text())["train"]["steps"] == 3
    assert [steps(script) for script in scripts] == [1, 2, 3]


@pytest.mark.parametrize("code", [75, None])
def test_a_cancelled_job_that_has_not_saved_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """It was said to have saved what an older checkpoint holds."""
    run = submitted(tmp_path / "run", {"job_id": 12, "kind": "pretrain"}, {"job_id": 13})
    (run / "config.yaml").write_text("")
    start_attempt(run, 9, slurm := {"SLURM_JOB_ID": "12"})
    jobs = [own_job(run)] if code == 75 else [own_job(run), replace(own_job(run), id=13, user="somebody")]
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: jobs)
    monkeypatch.setattr(slurm_commands, "update_job", lambda job_id, **values: None)
    monkeypatch.setattr(slurm_commands, "has_ended", lambda job_id, task: True)

    def signal(job_id: str, *more: str) -> None:
        end_attempt(run, 143 if code is None else code, 9, True, False, slurm)

    monkeypatch.setattr(slurm_commands, "cancel", signal)
    result = medvlp("cancel", run)
    if code == 75:
        assert result.exit_code == 0, result.exception
        assert "it had not trained far enough" in result.output
    else:
        assert isinstance(result.exception, AttemptError)
        assert "job 12 ended without saving: cancelled on request" in str(result.exception)
        assert f"job 13 of {run} belongs to somebody: not cancelled" in str(result.exception)


def test_waiting_for_a_job_asks_for_it_alone_and_bears_a_controller_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter(
        ["N/A RUNNING\n", SlurmError("squeue: unable to contact slurm controller"), "N/A COMPLETED\n"]
    )
    asked: list[list[str]] = []

    def squeue(command: list[str]) -> str:
        asked.append(command)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm_commands, "run_command", squeue)
    monkeypatch.setattr(cancelling, "_POLL_SECONDS", 0.0)
    cancelling.wait_until_over(JOB, 60)
    assert [(command[0], "--jobs=12" in command) for command in asked] == [("squeue", True)] * 3
    answers = iter([SlurmError("squeue: no")] * 2)
    monkeypatch.setattr(run_jobs, "_UNANSWERED_SECONDS", -1.0)
    with pytest.raises(SlurmError, match="squeue: no"):
        cancelling.wait_until_over(JOB, 60)


@pytest.mark.parametrize(("task", "ended"), [(None, False), (0, True), (1, False), (2, False), (3, True)])
def test_the_end_of_a_task_is_not_that_of_its_array(
    monkeypatch: pytest.MonkeyPatch, task: int | None, ended: bool
) -> None:
    told = "0 COMPLETED\n1 RUNNING\n2 PENDING\n"
    monkeypatch.setattr(slurm_commands, "run_command", lambda command: told)
    assert slurm_commands.has_ended(9, task) is ended

    def forgotten(command: list[str]) -> str:
        raise SlurmError("squeue: slurm_load_jobs error: Invalid job id specified")

    monkeypatch.setattr(slurm_commands, "run_command", forgotten)
    assert slurm_commands.has_ended(9, task)

"""Logs, job lists and job scripts, as far as they need no Slurm."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher import command_words
from launcher.commands import shards as shards_command
from launcher.commands import submit
from launcher.main import app
from launcher.number_text import bytes_text, duration_text, number_text
from launcher.slurm import cancelling, logs, run_jobs, slurm_commands
from launcher.slurm.cluster_config import ClusterConfig
from launcher.slurm.heterogeneous import prototype_server
from launcher.slurm.slurm_commands import Job
from medvlp import trust
from medvlp.runs.errors import RunFolderError
from shards.errors import UsageError

JOB = Job(
    12, "run", "RUNNING", (), "None", "n1", 0, "gpu", "me", 60, 1, 2, 3, None, None, "", None, 0, "", ""
)  # fmt: skip


def submitted(folder: Path, *lines: dict[str, object]) -> Path:
    (folder / "slurm").mkdir(parents=True)
    (folder / "slurm/jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def own_job(folder: Path) -> Job:
    """JOB as one of this user for a folder."""
    user = pwd.getpwuid(os.getuid()).pw_name
    return replace(JOB, user=user, standard_output=str(folder / "slurm/job-%j.out"))


def medvlp(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_rank_is_told_by_its_mark() -> None:
    lines = ["10:00:00 step 1", "10:00:01 rank 3: slow", "rank 12 lost another rank", "error: rank 3 died"]
    assert list(logs.of_rank(lines, None)) == lines
    assert list(logs.of_rank(lines, 0)) == [lines[0], lines[3]]
    assert list(logs.of_rank(lines, 3)) == [lines[1]]
    assert list(logs.of_rank(lines, 12)) == [lines[2]]


def test_following_goes_on_where_the_end_was_shown(tmp_path: Path) -> None:
    path = tmp_path / "job-7.out"
    path.write_text("one\ntwo\nthr")
    assert logs.tail(path, 1, None) == (["two"], 8)
    answers = iter([("ee\n", False), ("four\nfi", False), ("ve\nlast", True)])

    def is_over() -> bool:
        text, over = next(answers)
        with path.open("a") as file:
            file.write(text)
        return over

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "_ASK_SECONDS", 0)
        found = list(logs.follow(path, 8, is_over))
    assert found == ["three", "four", "five", "last"]


def test_the_newest_job_is_shown_and_its_control_characters_are_not(tmp_path: Path) -> None:
    run = submitted(tmp_path / "run", {"job_id": 7}, {"job_id": 11})
    (run / "slurm/job-7.out").write_text("old\n")
    for task in (0, 1, 10):
        (run / f"slurm/job-11_{task}.out").write_text(f"task {task} \x1b[31mred\x07\n")
    result = medvlp("logs", run)
    shown = [line for line in result.output.splitlines() if line.startswith("task")]
    assert shown == ["task 0 [31mred", "task 1 [31mred", "task 10 [31mred"]
    assert logs.log_files(run, 7) == [run / "slurm/job-7.out"]
    with pytest.raises(logs.LogError, match="job 8 has not written"):
        logs.log_files(run, 8)


@pytest.mark.parametrize(
    ("job", "label"),
    [
        (JOB, "12"),
        (replace(JOB, array_job_id=9, array_task_id=3), "9_3"),
        (replace(JOB, array_job_id=9, array_tasks="4-7%2"), "9_[4-7%2]"),
        (replace(JOB, het_job_id=12, het_job_offset=1), "12+1"),
    ],
)
def test_jobs_are_called_as_squeue_does(job: Job, label: str) -> None:
    assert run_jobs.label_of(job) == label


def test_jobs_belong_to_the_folder_their_output_goes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted(tmp_path / "run", {"job_id": 12, "kind": "pretrain"})
    ours = replace(JOB, standard_output=str(run / "slurm/job-%j.out"))
    others = [
        replace(JOB, id=13, standard_output=str(tmp_path / "slurm-13.out")),
        replace(JOB, id=14, standard_output=str(tmp_path / "else/slurm/job-%j.out")),
    ]
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: [ours, *others])
    (found,) = run_jobs.current_jobs(None)
    assert (found.folder, found.kind, found.run) == (run, "pretrain", None)
    monkeypatch.setattr(slurm_commands, "is_installed", lambda: True)
    assert run_jobs.jobs_by_folder() == {run: [ours]}
    monkeypatch.setattr(slurm_commands, "is_installed", lambda: False)
    assert run_jobs.jobs_by_folder() is None


def test_an_array_and_a_job_of_two_components_are_cancelled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted(tmp_path / "run", {"job_id": 9, "kind": "shards"}, {"job_id": 30, "kind": "pretrain"})
    ours = own_job(run)
    jobs = [
        *(replace(ours, id=9 + task, array_job_id=9, array_task_id=task) for task in range(3)),
        replace(ours, id=13, state="PENDING", array_job_id=9, array_tasks="3-5"),
        *(replace(ours, id=30 + offset, het_job_id=30, het_job_offset=offset) for offset in range(2)),
        replace(ours, id=40, state="COMPLETED"),
    ]
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: jobs)
    chosen = cancelling.jobs_to_cancel(run_jobs.Target(run)).jobs
    assert [run_jobs.submitted_id(job) for job in chosen] == [9, 30]
    assert chosen[1].het_job_offset == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"user": "somebody"}, "job 12 of {run} belongs to somebody: not cancelled"),
        (
            {"standard_output": "/home/me/slurm-12.out"},
            "left out: job 12 (run), which {run} names, is not of it",
        ),
        ({"standard_output": "{other}/slurm/job-%j.out"}, "left out: job 12 (run)"),
    ],
)
def test_a_job_that_only_the_folder_claims_is_not_cancelled_and_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str
) -> None:
    run = submitted(tmp_path / "run", {"job_id": 12, "kind": "pretrain"}, {"job_id": 13}, {"job_id": "x"})
    other = submitted(tmp_path / "other", {"job_id": 12, "kind": "pretrain"})
    foreign = replace(own_job(run), **{name: text.format(other=other) for name, text in change.items()})
    ended: list[str] = []
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: [
        job for job in (replace(own_job(run), id=13), foreign) if ids is None or job.id in ids
    ])  # fmt: skip
    monkeypatch.setattr(slurm_commands, "cancel", lambda job_id, *more: ended.append(job_id))
    result = medvlp("cancel", run, "--now")
    assert isinstance(result.exception, cancelling.NotOwnError) == ("user" in change)
    assert said.format(run=run) in f"{result.output}{result.exception}"
    assert ended == ["13"]


def test_targets_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_commands, "list_jobs", lambda ids=None, user=None: [])
    for target, error in [
        (str(tmp_path), UsageError), ("nowhere", run_jobs.UnknownJobError), ("77", run_jobs.UnknownJobError),
        ("77_[1-3]", run_jobs.UnknownJobError),
    ]:  # fmt: skip
        with pytest.raises(error):
            run_jobs.find(target)
    assert run_jobs.find(str(submitted(tmp_path / "run"))) == (tmp_path / "run", None, None)


def test_a_command_line_is_understood_and_written_again() -> None:
    parsed = command_words.parse(shards_command.app, ["build", "phantom", "--out", "x", "--studies=9"])
    assert (parsed.values["studies"], parsed.values["part"]) == (9, None)
    assert parsed.given == {"out", "studies"}
    assert command_words.option_words(parsed.command, {"studies": 9, "part": None}) == ["--studies=9"]
    default = command_words.parse(submit.app, ["x=1", "--nodes", "3", "--exclusive"])
    assert default.values["arguments"] == ["x=1"]
    values = {"nodes": 3, "exclusive": True, "preflight": False}
    assert command_words.option_words(default.command, values) == ["--nodes=3", "--exclusive"]


def test_every_job_takes_the_options_of_slurm(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    shared = {
        "time": "7", "partition": "p", "account": "a", "qos": "q", "constraint": "c", "reservation": "r",
        "mem": "3G", "exclude": "n1", "cpus-per-task": "2",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in shared.items()]
    for command in (
        ["pretrain", "data.root=/d", f"run.dir={tmp_path}", "train.global_batch=8"],
        ["shards", "build", "phantom", "--out", tmp_path, "--parts", "2"],
        ["evaluate", tmp_path],
        ["prototypes", tmp_path, "--port", "5"],
    ):
        result = medvlp("submit", *command, *words, "--dry-run")
        assert result.exit_code == 0, result.exception or result.output
        assert [word for word in words if f"#SBATCH {word}\n" not in result.output] == [], command


def test_an_array_of_parts_is_a_script_that_bash_reads(tmp_path: Path) -> None:
    out = tmp_path / "it's here"
    words = ["build", "phantom", "--out", out, "--studies", "9", "--parts", "5", "--at-once", "2"]
    result = medvlp("submit", "shards", *words, "--cpus-per-task", "3", "--dry-run")
    assert result.exit_code == 0, result.output
    script = result.output
    assert "#SBATCH --array=0-4%2\n" in script
    assert "--signal" not in script
    assert "--workers 3" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    for bad in (["verify", str(out)], ["build", "phantom", "--out", "x", "--part", "0/3"]):
        assert isinstance(medvlp("submit", "shards", *bad, "--parts", "2").exception, UsageError)


def test_an_array_of_evaluations_has_a_case_for_each(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").write_text("")
    tasks = ["--task", "retrieval", "--task", "zero-shot", "--after", "7"]
    result = medvlp("submit", "evaluate", *runs, "evaluation.seed=3", *tasks, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "#SBATCH --array=0-3\n" in result.output
    assert "#SBATCH --dependency=afterok:7\n#SBATCH --array" in result.output
    assert f"3)\n    set -- evaluate {runs[1]} evaluation.seed=3 --task zero-shot --out" in result.output
    assert not (runs[0] / "evaluation-parts").exists()
    settings = tmp_path / "settings.yaml"
    settings.write_text("evaluation: {tasks: {fine-tuning: {seeds: [4, 5]}}}")
    words = [settings, "evaluation.seed=3", "--task", "fine-tuning", "--fraction", "1"]
    result = medvlp("submit", "evaluate", runs[0], *words, "--dry-run")
    assert f"evaluate {runs[0]} {settings} evaluation.seed=3" in result.output
    assert "--unit fraction-1-seed-5 --out" in result.output
    assert isinstance(medvlp("submit", "evaluate", tmp_path / "none").exception, RunFolderError)
    assert isinstance(medvlp("submit", "evaluate", "x=1").exception, UsageError)
    unused = medvlp("submit", "evaluate", runs[0], "train.epochs=3", "--task", "retrieval", "--dry-run")
    assert "train.epochs of the run changes nothing that is evaluated" in str(unused.exception)


def test_a_second_component_asks_for_itself(tmp_path: Path) -> None:
    given = {"partition": "gpu", "time": "60", "gpus_per_node": 8, "constraint": "h100"}
    words = submit.serving_words(tmp_path, ["--port", "5"])
    beside = prototype_server(ClusterConfig(), tmp_path, words, given, ["partition=cpu", "mem=8G"])
    assert beside is not None
    request = beside.request
    assert (request.partition, request.mem, request.time) == ("cpu", "8G", "60")
    assert (request.gpus_per_node, request.constraint, request.nodes) == (0, None, 1)
    assert beside.words == ["prototypes", "serve", str(tmp_path), "--follow", "--port", "5"]
    with pytest.raises(UsageError, match="gpus=1"):
        prototype_server(ClusterConfig(), tmp_path, [], given, ["gpus=1"])
    assert prototype_server(ClusterConfig(), tmp_path, None, given, None) is None
    with pytest.raises(UsageError, match="--serve-prototypes"):
        prototype_server(ClusterConfig(), tmp_path, None, given, ["mem=8G"])
    with pytest.raises(Exception, match="No such option"):
        submit.serving_words(tmp_path, ["--ports", "5"])


def test_a_resume_stands_on_the_newest_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = ["submit", "pretrain", "gone.yaml", "--nodes=2", "--time=30", "--dependency=afterok:3"]
    run = submitted(
        tmp_path / "run",
        {"job_id": 4, "kind": "pretrain", "arguments": stored},
        {"job_id": 5, "kind": "evaluate", "arguments": ["submit", "evaluate", "x"]},
    )
    config = ["data.root=/d", f"run.dir={run}", "train.global_batch=24"]
    (run / "slurm/config.yaml").write_text(medvlp("config", *config).output)
    refused = medvlp("resume", run, "--dry-run").exception
    assert isinstance(refused, trust.TrustError)
    assert "--nodes=2 --time=30" in str(refused)
    trust.remember("submission", stored)
    result = medvlp("resume", run, "--nodes", "3", "precision=fp32", "--dry-run")
    assert result.exit_code == 0, result.exception or result.output
    assert "#SBATCH --nodes=3\n" in result.output
    assert "#SBATCH --time=30\n" in result.output
    assert "afterok" not in result.output
    assert isinstance(medvlp("resume", tmp_path / "none").exception, RunFolderError)


def test_figures_are_short() -> None:
    assert [duration_text(seconds) for seconds in (9, 754, 7500, 98000)] == ["9s", "12m34s", "2h05m", "1d03h"]
    assert [bytes_text(count) for count in (7, 1234567, 5 * 10**12)] == ["7 B", "1.2 MB", "5.0 TB"]
    assert (number_text(None), number_text(2.345, 2), number_text(7)) == ("", "2.35", "7")

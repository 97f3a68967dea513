"""Arrays on a real Slurm: parts of a dataset and the job that merges them; evaluations after a training."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.commands.evaluate import unit_words
from launcher.slurm import slurm_commands
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.report import results
from medvlp.evaluation.supervised import train_here
from tests.launcher.tiny_run import make_run, make_shards
from tests.slurm.cluster import FAULTS, PATIENCE, REPOSITORY, Cluster, lines, starts
from tests.slurm.commands import medvlp

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3 * PATIENCE)]

BUILD = [
    "build",
    "phantom",
    "--studies",
    "40",
    "--image-size",
    "64",
    "--samples-per-shard",
    "8",
    "--seed",
    "5",
]


def submitted(output: str) -> list[int]:
    """The ids of the first job and of the one that depends on it."""
    return [int(number) for number in re.findall(r"(?:array|job|evaluation) (\d+)", output)][:2]


def test_parts_built_by_an_array_are_the_dataset_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    parted, whole = tmp_path / "parted", tmp_path / "whole"
    output = medvlp(
        "submit", "shards", *BUILD, "--out", parted, "--parts", "4", "--time", "5", "--cpus-per-task", "1"
    )
    array, merging = submitted(output)
    medvlp("shards", *BUILD, "--out", whole, "--workers", "1")
    assert cluster.wait_for_end(merging, parted).state == "COMPLETED"
    tasks = slurm_commands.list_jobs([array])
    assert [task.state for task in tasks] == ["COMPLETED"] * 4
    assert {task.array_task_id for task in tasks} == {0, 1, 2, 3}
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in parted.iterdir()} == names | {"slurm"}
    for name in names:
        assert (parted / name).read_bytes() == (whole / name).read_bytes(), name
    assert "40 records, 0 rejected" in medvlp("logs", merging)
    assert [line["kind"] for line in lines(parted / "slurm/jobs.jsonl")] == ["shards", "merge"]
    assert medvlp("logs", array).count("is built") == 4


def test_nothing_is_merged_when_a_part_fails(cluster: Cluster, tmp_path: Path) -> None:
    missing = ["--table", tmp_path / "none.csv", "--images", tmp_path, "--map", tmp_path / "none.yaml"]
    output = medvlp(
        "submit",
        "shards",
        "build",
        "table",
        *missing,
        "--out",
        tmp_path / "out",
        "--parts",
        "2",
        "--time",
        "5",
    )
    array, merging = submitted(output)
    assert cluster.wait_for_end(merging, tmp_path / "out").state == "CANCELLED"
    assert {task.state for task in slurm_commands.list_jobs([array])} == {"FAILED"}
    assert "none.yaml: No such file or directory" in medvlp("logs", array)


def test_evaluations_run_after_a_training_and_are_joined(
    cluster: Cluster, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    medvlp("shards", "build", "phantom", "--out", other, "--studies", "160", "--image-size", "64",
           "--split", "train=0.5,valid=0.25,test=0.25", "--workers", "1")  # fmt: skip
    training = cluster.submit(*tiny("run", "train.steps=2", "evaluation.bootstrap=20", "--nodes", "1"))
    words = [
        "evaluate", run, "--task", "retrieval", "--task", "linear-probe", "--data", other,
        "evaluation.tasks.linear-probe.fractions=[0.5,1.0]",
    ]  # fmt: skip
    output = medvlp("submit", *words, "--after", training, "--time", "5")
    array, comparing = submitted(output)
    assert {job.state for job in slurm_commands.list_jobs([array, comparing])} == {"PENDING"}
    assert cluster.wait_for_end(comparing, run).state == "COMPLETED"
    ends = {job.id: job.end_time for job in slurm_commands.list_jobs([training, array, comparing])}
    assert ends[training] <= min(end for job_id, end in ends.items() if job_id != training)
    parts = {path.name for path in (run / "evaluation-parts").iterdir()}
    assert parts == {
        "retrieval.json", "linear-probe.fraction-0.5.json", "linear-probe.fraction-1.json",
    }  # fmt: skip
    joined = json.loads((run / "evaluation.json").read_text())
    assert joined["model"]["step"] == 2
    assert "linear-probe" in medvlp("logs", comparing)
    medvlp(*words, "--fresh", "--out", tmp_path / "local.json")
    local = json.loads((tmp_path / "local.json").read_text())
    for part in ("results", "notes", "data"):
        assert joined[part] == local[part], part
    assert joined["settings"]["options"] == local["settings"]["options"]


TRAINED = [
    "--task", "fine-tuning", "--fraction", "0.5", "--seed", "0", "--seed", "1", "evaluation.bootstrap=20",
    "monitor.wandb=disabled", "monitor.progress=false", "zero.stage=0",
    "evaluation.tasks.fine-tuning.training={train: {steps: 40, min_steps: 0, global_batch: 16, threads: 1}}",
]  # fmt: skip


def test_a_task_that_trains_is_the_same_as_an_array_also_where_one_of_its_jobs_was_asked_to_stop(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, local, slow = tmp_path / "run", tmp_path / "local", tmp_path / "slow"
    make_run(make_shards(tmp_path / "data"), run)
    shutil.copytree(run, local)
    slow.touch()
    monkeypatch.setenv("MEDVLP_TEST_SLOW", str(slow))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), str(REPOSITORY)]))
    output = medvlp("submit", "evaluate", run, *TRAINED, "--time", "60", "--cpus-per-task", "1")
    array, comparing = submitted(output)
    training = cluster.wait("training", lambda: next(run.glob("evaluation-units/*/*seed-0-*/trained"), None))
    cluster.wait_for_step(training, 3)
    slurm_commands.cancel(f"{array}_0", "--signal=USR1", "--batch")
    cluster.wait("requeue", lambda: [job for job in slurm_commands.list_jobs([array]) if job.restarts])
    slow.unlink()
    assert cluster.wait_for_end(comparing, run).state == "COMPLETED"
    tasks = slurm_commands.list_jobs([array])
    assert {task.array_task_id: task.restarts for task in tasks} == {0: 1, 1: 0}
    assert [event["kind"] for event in starts(training)] == ["start", "resume"]
    assert starts(training)[1]["step"] >= 3
    words = [*unit_words(["fine-tuning"], [0.5], [0, 1]), *(word for word in TRAINED if "=" in word)]
    options = EvaluationOptions(local, tasks=["fine-tuning"], overrides=words, train=train_here)
    results.write(evaluate(options, lambda line: None), tmp_path / "local.json")
    joined, alone = (results.read(file) for file in (run / "evaluation.json", tmp_path / "local.json"))
    assert "auroc-sd@50%/macro" in alone.results["fine-tuning"]["trained"]
    assert joined.results == alone.results

"""What W&B's own reader finds of a run that was killed, resumed and evaluated, and of its gallery."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from launcher.main import app
from medvlp import trust
from tests.launcher.forked_command import ForkedCommand, environment
from tests.launcher.test_pretrain_command import PATIENCE, arguments, medvlp, wait_for_steps
from tests.launcher.test_pretrain_command import data as data
from tests.serving.runs import save_run
from tests.training.runs import read_metrics
from tests.training.test_monitor import records


def kill_all(process: ForkedCommand) -> None:
    """SIGKILL to a process and everything below it at once, W&B's own service too, as a lost node does."""
    whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in whole:
        one.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    psutil.wait_procs(whole, timeout=PATIENCE)


def as_read(parts: list[dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Rows of the history as W&B has them after the parts were sent in order: a step that it has stays."""
    rows: dict[int, dict[str, Any]] = {}
    for part in parts:
        for record in part.get("history", []):
            rows.setdefault(record["item"]["_step"], record["item"])
    return [rows[step] for step in sorted(rows)]


@pytest.mark.dist
@pytest.mark.timeout(3 * PATIENCE)
def test_a_run_that_was_killed_resumed_and_evaluated_is_one_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["monitor.wandb=offline", "checkpoint.every_steps=2", "train.steps=400", "run.name=killed"]
    process = ForkedCommand(*arguments(data, run, *options, "--nproc", "1"), environment=environment())
    wait_for_steps(run, 5, process)
    while not (run / "checkpoints" / "latest").is_file() and process.poll() is None:
        time.sleep(0.1)
    kill_all(process)
    last = read_metrics(run)[-1]["step"] + 4
    options[2] = f"train.steps={last}"
    code, output = medvlp(*arguments(data, run, *options, "--nproc", "1"))
    assert code == 0, output
    told = re.search(rf"after step (\d+) of {last}\b", output)
    assert told, output
    saved = int(told[1])
    code, output = medvlp("evaluate", str(run), "--task", "retrieval", "evaluation.bootstrap=20")
    assert code == 0, output

    folders = sorted((run / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime)
    assert len(folders) == 3
    # W&B's service writes behind the command, and may outlive it: its last record says the exit code.
    deadline = time.monotonic() + PATIENCE
    while "exit" not in (second := records(folders[1])) or "exit" not in (third := records(folders[2])):
        assert time.monotonic() < deadline, folders
        time.sleep(0.5)
    parts = [records(folders[0]), second, third]
    # W&B's service was killed too: of the first part nothing may have reached the disk.
    begun = [record for part in parts for record in part.get("run", [])]
    (run_id,) = {record["run_id"] for record in begun}
    assert all(folder.name.endswith(f"-{run_id}") for folder in folders)
    assert [record["job_type"] for record in begun][-2:] == ["train", "evaluation"]
    steps = [item["item"]["_step"] for item in second["history"]]
    assert steps == list(range(1, last + 1)), "those before the checkpoint, then those after it"
    rows = [row for row in as_read(parts) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, last + 1)), "every step once, none lost"
    losses = {line["step"]: line["loss"] for line in read_metrics(run)}
    assert [row["loss"] for row in rows] == pytest.approx([losses[row["step"]] for row in rows])
    assert all(0 <= row["system/node-0/memory_percent"] <= 100 for row in rows[saved:])
    summary = {name: of for record in third["summary"] for name, of in record["update"].items()}
    assert summary["evaluation/step"] == last
    assert 0 <= summary["evaluation/test/retrieval/image_to_text/R@1"] <= 1


@pytest.mark.parametrize("shares", [False, True])
def test_a_gallery_goes_to_wandb_only_where_samples_are_shared(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "run"
    save_run(data, run, "monitor.wandb=offline", "monitor.share_samples=true")
    (run / "wandb-run-id").write_text("abcd1234\n")
    if shares:
        trust.remember("monitor.share_samples", True)
    for command in (["build", str(run), "--clusters", "2"], ["gallery", str(run)]):
        result = CliRunner().invoke(app, ["prototypes", *command])
        assert result.exit_code == 0, result.exception
    sheets = list((run / "prototypes" / "gallery").glob("*.png"))
    assert sheets
    assert (run / "wandb").exists() == shares
    if shares:
        (item,) = (record["item"] for record in records(run / "wandb")["history"])
        assert item["prototypes/gallery.count"] == len(sheets)

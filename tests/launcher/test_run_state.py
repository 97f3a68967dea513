"""What `medvlp runs` and `medvlp jobs` make of a run folder."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from typer.testing import CliRunner

from launcher.main import app
from launcher.run_state import find_runs, read_run
from medvlp.runs import manifest
from medvlp.runs.events import EventLog
from medvlp.runs.manifest import MANIFEST, Manifest, step_folder
from tests.shards.hostile import mutate_json, to_bytes

CONFIG = """
run: {name: trial}
method: {name: mgca}
checkpoint: {keep_best: retrieval/top1, best_mode: max}
train: {step_timeout_seconds: 50}
"""


def write_run(folder: Path, steps: list[int], checkpoints: dict[int, float]) -> EventLog:
    """A run folder as training leaves it, with a logged line a step and checkpoints with a metric."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in steps:
            line: dict[str, Any] = {"step": step, "epoch": step // 10, "loss": 5 - step / 100}
            file.write(json.dumps(line | {"samples_per_second": 80.0, "step_seconds": 2.0}) + "\n")
    for step, value in checkpoints.items():
        place = folder / "checkpoints" / step_folder(step)
        place.mkdir(parents=True)
        manifest = Manifest(step, step // 10, 2, 1, "fp32", 16, "0", wandb_run_id="abc123")
        manifest.metrics = {"retrieval/top1": value}
        manifest.files = {"weights.safetensors": {"bytes": 1000 * step, "xxh3_128": "0"}}
        (place / MANIFEST).write_text(manifest.to_json())
    return EventLog(folder)


def add_attempt(folder: Path, **values: Any) -> None:
    (folder / "slurm").mkdir(exist_ok=True)
    with (folder / "slurm" / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def test_a_finished_run(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", [10, 20, 30], {10: 0.7, 20: 0.9, 30: 0.8})
    events.note("start", 0, steps=30, ranks=2)
    events.note("finish", 30, by=None)
    run = read_run(tmp_path / "a")
    assert (run.state, run.step, run.steps, run.epoch) == ("finished", 30, 30, 3)
    assert (run.name, run.method, run.best_metric, run.best) == ("trial", "mgca", "retrieval/top1", 0.9)
    assert run.checkpoint is not None
    assert (run.checkpoint.step, run.checkpoint.bytes, run.wandb_run_id) == (30, 30000, "abc123")
    assert run.eta_seconds == 0
    assert run.bytes == sum(path.stat().st_size for path in (tmp_path / "a").rglob("*") if path.is_file())


def test_a_running_run_with_a_line_that_is_being_written(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", [10, 20], {})
    events.note("start", 0, steps=100, ranks=2)
    events.note("bad_step", 12, ranks=[0])
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "ep')
    run = read_run(tmp_path / "a")
    assert (run.state, run.step, run.steps) == ("running", 20, 100)
    assert run.eta_seconds == 160
    assert run.samples_per_second == 80


@pytest.mark.parametrize(
    ("event", "attempt", "job_runs", "state", "reason"),
    [
        ("interrupt", {}, None, "interrupted", "SIGUSR1"),
        ("interrupt", {"exit_code": 75}, True, "running", ""),
        (None, {"exit_code": 5}, False, "failed", "too many bad steps in a row"),
        (None, {"exit_code": 137}, None, "failed", "killed by SIGKILL"),
        (None, {}, False, "failed", "ended without a word (killed, or its machine is gone)"),
        (None, {}, True, "running", ""),
    ],
)
def test_the_end_of_a_run_is_named(
    event: str | None,
    attempt: dict[str, Any],
    job_runs: bool | None,
    state: str,
    reason: str,
    tmp_path: Path,
) -> None:
    events = write_run(tmp_path / "a", [10], {})
    events.note("start", 0, steps=100, ranks=2)
    if event:
        events.note(event, 10, by="SIGUSR1")
    if attempt:
        add_attempt(tmp_path / "a", job_id=3, **attempt)
    long_ago = time.time() - 51  # one second more than step_timeout_seconds
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(tmp_path / "a" / name, (long_ago, long_ago))
    run = read_run(tmp_path / "a", job_runs)
    assert (run.state, run.reason) == (state, reason)


@pytest.mark.parametrize("event", ["finish", "interrupt"])
def test_a_later_attempt_that_failed_before_its_first_event_is_told(event: str, tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", [10], {})
    events.note("start", 0, steps=10, ranks=2)
    add_attempt(tmp_path / "a", job_id=3, started="2020-01-01T00:00:00+00:00", exit_code=4)
    events.note(event, 10, by=None)
    before = read_run(tmp_path / "a").state
    assert before == {"finish": "finished", "interrupt": "interrupted"}[event]
    add_attempt(tmp_path / "a", job_id=4, started="2120-01-01T00:00:00+00:00", exit_code=None)
    assert read_run(tmp_path / "a").state == before
    add_attempt(tmp_path / "a", job_id=5, started="2120-01-01T00:00:00+00:00", exit_code=2)
    run = read_run(tmp_path / "a")
    assert (run.state, run.reason) == ("failed", "wrong command line or config")


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", [10], {10: 0.5, 20: 0.6})
    read = manifest.read_limited

    def stale(path: Path, most: int) -> bytes:
        if step_folder(20) in str(path):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path, most)

    monkeypatch.setattr(manifest, "read_limited", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        read_run(tmp_path / "a")
    result = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert "manifest.json cannot be read: Stale file handle" in result.stderr
    assert result.exit_code == 0


def test_what_stands_in_brackets_is_shown_as_it_is(tmp_path: Path) -> None:
    """It was taken for markup: left out, or an error."""
    run = tmp_path / "a[" / "x]"
    write_run(run, [20], {20: 0.9})
    (run / "config.yaml").write_text(CONFIG.replace("mgca", '"m[/y]"'))
    file = run / "checkpoints" / step_folder(20) / MANIFEST
    made = Manifest.read(file.parent)
    made.created, made.wandb_run_id = "[/now]", "[/id]"
    file.write_text(made.to_json())
    for words, told in ((("runs", tmp_path), ("x]", "m[/y]", "[/id]")), (("checkpoints", run), ("[/now]",))):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.exception
        for text in told:
            assert text in result.stdout


def test_a_resumed_run_is_not_judged_by_its_earlier_end(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", [10], {10: 0.5})
    for kind in ("start", "interrupt", "resume"):
        events.note(kind, 10, steps=100, by="SIGTERM")
    assert read_run(tmp_path / "a").state == "running"


def test_damage_is_no_end_of_looking(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", [10], {10: 0.5, 20: 0.6})
    events.note("start", 0, steps=100)
    (tmp_path / "a" / "checkpoints" / step_folder(20) / MANIFEST).write_text("{")
    (tmp_path / "a" / "config.yaml").write_text("run: [")
    run = read_run(tmp_path / "a")
    assert run.checkpoint is not None
    assert run.checkpoint.step == 10
    assert (run.name, run.method) == ("a", "")


def test_runs_are_found_below_a_folder_and_not_inside_each_other(tmp_path: Path) -> None:
    for name in ("b/two", "b/one", "a", "a/copies/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(CONFIG)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "c" / "slurm").mkdir(parents=True)
    (tmp_path / "c" / "slurm" / "config.yaml").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == ["a", "b/one", "b/two", "c"]
    assert read_run(tmp_path / "c").state == "new"


def test_an_export_is_no_run(tmp_path: Path) -> None:
    for name in ("config.yaml", "heads.safetensors"):
        (tmp_path / name).touch()
    assert not list(find_runs(tmp_path))


def test_looking_at_runs_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", [10], {10: 0.5}).note("start", 0, steps=20)
    code = (
        "import sys\nfrom launcher.main import app\n"
        "for command in (['runs', sys.argv[1], '--json'], ['logs', '--help'], ['jobs', '--help'],\n"
        "                ['cancel', '--help'], ['resume', '--help']):\n"
        "    try:\n        app(command, standalone_mode=False)\n"
        "    except SystemExit as ended:\n        assert not ended.code, command\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.index("]\n") + 1])[0]["step"] == 10


def test_rubbish_in_the_files_of_a_run_is_passed_over(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", [10, 20, 30], {10: 0.7, 20: 0.9})
    events.note("start", 0, steps=30, ranks=2)
    add_attempt(tmp_path / "a", job_id=7, exit_code=1)
    generator = random.Random(0)
    files = [tmp_path / "a" / name for name in
             ("metrics.jsonl", "events.jsonl", "config.yaml", "slurm/attempts.jsonl")]  # fmt: skip
    manifest = tmp_path / "a" / "checkpoints" / step_folder(20) / MANIFEST
    for _ in range(100):
        file = generator.choice([*files, manifest])
        whole = file.read_bytes()
        if file.suffix == ".jsonl":
            last = json.loads(whole.splitlines()[-1])
            rubbish = whole + to_bytes(mutate_json(last, generator)) + b"\n"
        elif file.suffix == ".yaml":
            rubbish = to_bytes(mutate_json(yaml.safe_load(whole), generator))
        else:
            rubbish = to_bytes(mutate_json(json.loads(whole) | {"checksum": "", "format": 1}, generator))
        file.write_bytes(rubbish)
        found = CliRunner().invoke(app, ["runs", str(tmp_path)])
        assert found.exception is None, (file, rubbish[-300:], found.exception)
        assert found.exit_code == 0
        file.write_bytes(whole)


def test_offline_parts_go_to_wandb_in_order_and_without_running_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def sync() -> str:
        """What this program and W&B's own say."""
        result = CliRunner().invoke(app, ["runs", str(tmp_path), "--sync", "--dry-run"])
        assert result.exit_code == 0
        return result.output + capfd.readouterr().err

    write_run(tmp_path / "a", [10], {10: 0.5}).note("finish", 10)
    write_run(tmp_path / "b", [10], {10: 0.5}).note("start", 0, steps=100)
    (tmp_path / "b/wandb/offline-run-20261128_000000-b").mkdir(parents=True)
    assert sync() == f"{tmp_path}/b: still running, left out\nnothing was logged offline\n"
    settings = wandb.Settings(silent=True, console="off")
    for step in (1, 2):
        part = wandb.init(mode="offline", id="abcd1234", dir=tmp_path / "a", settings=settings)
        part.log({"loss": 1.0}, step=step)
        part.finish()
        time.sleep(1.1)  # W&B names parts by the second
    first, second = sorted((tmp_path / "a/wandb").glob("offline-run-*"))
    said = sync()
    assert "Would sync 2 run(s)" in said
    assert said.index(first.name) < said.index(second.name)
    killed = tmp_path / "a/wandb/offline-run-20261128_000000-abcd1234"
    killed.mkdir()
    (killed / "run-abcd1234.wandb").write_bytes((first / "run-abcd1234.wandb").read_bytes()[:7])
    said = sync()
    assert "Would sync 2 run(s)" in said
    assert f"{killed}: holds nothing" in said.replace("\n", "")
    # W&B marks what it has sent, and passes over it.
    (first / "run-abcd1234.wandb.synced").touch()
    assert "Would sync 1 run(s)" in sync()

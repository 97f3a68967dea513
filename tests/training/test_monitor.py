"""metrics.jsonl across restarts, and what W&B's own reader finds in its offline files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import MonitorConfig
from medvlp.runs.errors import RunFolderError
from medvlp.runs.metrics_file import MetricsFile, last_lines
from medvlp.training.callbacks import StepRecord
from medvlp.training.monitor import Monitor
from medvlp.training.wandb_run import WandbRun, known_id, resolve_mode
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, read_metrics, train


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """type -> records of the .wandb files below a folder, oldest first, read by `wandb leet inspect`."""
    found: dict[str, list[dict[str, Any]]] = {}
    wandb = Path(sys.executable).with_name("wandb")
    for file in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime):
        command = [str(wandb), "leet", "inspect", "--json", str(file)]
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        ).stdout
        for line in output.splitlines():
            record = json.loads(line)
            found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def test_lines_beyond_the_step_and_torn_ones_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": None if step == 2 else 0.5})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 4, "lo')
    file = MetricsFile(path, step=2)
    file.write({"step": 3, "loss": 0.25})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.25},
    ]


def test_the_last_lines_are_read_and_pieces_of_lines_are_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n{"step": 2, "loss": null}\n{"step": 3}\n{"st')
    assert last_lines(path, 4) == [{"step": 2, "loss": None}, {"step": 3}]
    with pytest.raises(RunFolderError, match="cannot read"):
        last_lines(tmp_path / "none", 4)


@pytest.mark.dist
def test_metrics_of_a_run_and_its_offline_wandb_files(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    options = ["monitor.wandb=offline", "train.steps=4", "checkpoint.every_steps=2", "run.name=a name"]
    pool = gloo_pool(2)
    pool.run(train, overrides(*options))
    run = tmp_path / "run"
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {
        "epoch", "loss", "loss/instance", "lr", "samples_per_second", "step_seconds", "data_wait",
        "grad_norm", "memory_gib", "skipped_samples",
    }  # fmt: skip
    assert wanted <= lines[0].keys()
    assert lines[0]["samples_per_second"] == pytest.approx(16 / lines[0]["step_seconds"])
    assert 0 <= lines[0]["data_wait"] <= 1

    shutil.rmtree(run / "checkpoints/step-00000004")
    pool.run(train, overrides(*options))
    assert read_metrics(run)[:2] == lines[:2]
    found = records(run / "wandb")
    assert len(found["run"]) == 2
    ids = {record["run_id"] for record in found["run"]}
    assert ids == {json.loads((run / "checkpoints/step-00000002/manifest.json").read_text())["wandb_run_id"]}
    assert found["run"][0]["display_name"] == "a name"
    history = [record["item"] for record in found["history"]]
    assert [item["step"] for item in history] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [item["_step"] for item in history] == [1, 2, 3, 4, 1, 2, 3, 4]
    for item, line in zip(history, [*lines, *lines[:2]], strict=False):
        assert {name: item[name] for name in line} == line
    for item in history[:4]:
        assert 0 < item["system/node-0/memory_percent"] <= 100
        assert 0 <= item["system/node-0/cpu_percent"] <= 100


def test_memory_that_the_allocator_holds_is_told_beside_what_it_gave_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference is what fragments cost; on a CPU there is no allocator to ask."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 29)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 << 29)
    for step, kind in enumerate(("cuda", "cpu"), 1):
        engine: Any = SimpleNamespace(device=torch.device(kind), gradient_norm=lambda: 1.0)
        monitor = Monitor(tmp_path / f"{kind}.jsonl", 3, None, None)
        monitor.on_start(0)
        loss = {"loss": torch.tensor(0.5)}
        monitor.on_step(StepRecord(step, 0, False, True, True, loss, [], 1e-3, 8, 0, 0.1, 0.0, engine))
        monitor.on_end()
        [line] = [json.loads(text) for text in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        if kind == "cuda":
            assert (line["memory_gib"], line["memory_reserved_gib"]) == (1.5, 2.5)
        else:
            assert "memory_reserved_gib" not in line


@pytest.mark.dist
def test_metrics_are_read_only_at_logged_steps(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    gloo_pool(2).run(train, overrides("monitor.log_every=2", "train.steps=3"))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [2, 3]


def test_the_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("disabled") == "disabled"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / "netrc").chmod(0o600)
    assert resolve_mode("auto") == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"


def test_an_unreachable_server_is_a_warning_and_the_run_is_logged_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "local-" + "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    with caplog.at_level("WARNING", logger="medvlp"):
        run = WandbRun(MonitorConfig(wandb="online"), tmp_path, "name", {"train": {"steps": 1}}, "abcd1234")
    assert "W&B cannot be reached" in caplog.text
    run.log({"loss": 0.5, "grad_norm": None}, step=1)
    run.finish()
    offline = next((tmp_path / "wandb").glob("offline-run-*"))
    found = records(offline)
    assert found["run"][0]["run_id"] == "abcd1234"
    assert found["history"][0]["item"]["loss"] == 0.5


def test_seeds_are_grouped_and_alerts_come_only_where_they_are_asked_for(tmp_path: Path) -> None:
    for number, alerts in enumerate((True, False)):
        config = MonitorConfig(wandb="offline", group="all seeds", alerts=alerts)
        run = WandbRun(config, tmp_path / str(number), "name", {}, f"abcd123{number}")
        run.alert("bad step", "step 3 was skipped")
        run.log({"step": 1, "loss": 0.5}, step=1)
        run.finish()
    told, silent = (records(tmp_path / name / "wandb") for name in ("0", "1"))
    assert (told["run"][0]["run_group"], told["run"][0]["job_type"]) == ("all seeds", "train")
    assert [alert["title"] for alert in told["alert"]] == ["bad step"]
    assert "alert" not in silent
    axes = {record.get("name") or record.get("glob_name"): record for record in told["metric"]}
    assert axes["*"]["step_metric"] == "step"


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    run = WandbRun(MonitorConfig(wandb="disabled"), tmp_path, "name", {}, None)
    run.log({"loss": 1.0}, 1)
    run.finish()
    assert run.id is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shares", [False, True])
def test_pictures_and_texts_are_sent_only_where_samples_are_shared(tmp_path: Path, shares: bool) -> None:
    """Whoever hands them over."""
    run = WandbRun(MonitorConfig(wandb="offline", share_samples=shares), tmp_path, "name", {}, None)
    run.images("pictures", [(np.zeros((8, 8), dtype=np.uint8), "a film")])
    run.texts("reports", ("generated", "true"), [("clear lungs", "an effusion")])
    run.finish()
    assert bool(list(tmp_path.rglob("*.png"))) == shares
    assert any("an effusion" in file.read_text() for file in tmp_path.rglob("*.table.json")) == shares


def wandb_id(folder: Path, saved: str | None = None) -> str | None:
    """The id under which a training in a folder, from a checkpoint with the id `saved`, logs."""
    run = WandbRun(MonitorConfig(wandb="offline"), folder, "name", {}, saved)
    run.finish()
    return run.id


def test_a_start_before_the_first_checkpoint_continues_the_same_wandb_run(tmp_path: Path) -> None:
    first = wandb_id(tmp_path)
    assert wandb_id(tmp_path) == first
    (tmp_path / "wandb-run-id").write_text("../../elsewhere\n")
    assert wandb_id(tmp_path, "abcd1234") == "abcd1234"
    (tmp_path / "wandb-run-id").unlink()
    new = wandb_id(tmp_path)
    assert new not in (None, first)


def test_a_copy_of_a_run_folder_is_another_wandb_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two trainings must not write into one; a moved folder takes its own along."""
    run, copy, moved = (tmp_path / name for name in ("run", "copy", "moved"))
    run.mkdir()
    first = wandb_id(run)
    assert first is not None
    shutil.copytree(run, copy)
    new = wandb_id(copy, saved=first)
    assert new not in (None, first)
    assert f"{copy} is a copy of {run}" in caplog.text
    assert wandb_id(copy, saved=first) == new, "and stays that before its first checkpoint"
    assert known_id(copy, first) == new
    caplog.clear()
    (tmp_path / "link").symlink_to(run)
    assert wandb_id(tmp_path / "link", saved=first) == first
    run.rename(moved)
    assert wandb_id(moved, saved=first) == first
    assert "is a copy" not in caplog.text


def test_a_run_of_before_keeps_its_wandb_run(tmp_path: Path) -> None:
    (tmp_path / "wandb-run-id").write_text("abcd1234\n")
    assert wandb_id(tmp_path) == "abcd1234"


def test_a_run_without_wandb_imports_none(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "sys.modules['wandb'] = None\n"  # what `import wandb` would raise for
        "import medvlp.training.run\n"
        "from medvlp.config import MonitorConfig\n"
        "from medvlp.training.wandb_run import WandbRun\n"
        f"run = WandbRun(MonitorConfig(wandb='disabled'), Path({str(tmp_path)!r}), 'name', {{}}, None)\n"
        "run.log({'loss': 1.0}, 1)\n"
        "run.finish()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

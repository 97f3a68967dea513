"""Other forms of a checkpoint: plain safetensors, and DeepSpeed's universal checkpoint as it loads it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from launcher.main import app
from medvlp.runs.conversion import to_safetensors, to_universal
from medvlp.runs.errors import CheckpointError, RunFolderError
from medvlp.runs.run_lock import RunLock, this_process
from tests.runs.test_checkpoint import flip, refuse_content, save
from tests.training.saving import start, tiny_config, train_and_save, train_steps

pytestmark = pytest.mark.dist


def load_with_deepspeed(
    run_dir: str, universal: str, stage: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Whole weights after DeepSpeed's own loading, and the losses of two more steps."""
    config = tiny_config(run_dir, stage)
    config.deepspeed = {"checkpoint": {"load_universal": True}}
    engine, _ = start(config)
    path, _ = engine._engine.load_checkpoint(universal)
    assert path is not None
    weights = engine.full_weights()
    losses = train_steps(engine, 4, 5)
    engine.close()
    return weights, losses


def losses_of_one_run(run_dir: str, steps: int) -> list[float]:
    engine, _ = start(tiny_config(run_dir, 1))
    losses = train_steps(engine, 1, steps)
    engine.close()
    return losses


def test_deepspeed_loads_the_universal_form(gloo_pool, tmp_path):
    run = str(tmp_path / "run")
    gloo_pool(2).run(train_and_save, tiny_config(run, 3), 3)
    folder = tmp_path / "run/checkpoints/step-00000003"
    to_universal(folder, tmp_path / "universal")
    weights, losses = gloo_pool(1).run(load_with_deepspeed, run, str(tmp_path / "universal"), 2)[0]
    saved = load_file(folder / "weights.safetensors")
    # DeepSpeed takes no buffers from a universal checkpoint; "mean" is one.
    assert [name for name in saved if not torch.equal(weights[name], saved[name])] == ["mean"]
    assert losses == pytest.approx(gloo_pool(2).run(losses_of_one_run, run, 5)[0][3:], rel=1e-4)


def test_only_a_whole_checkpoint_is_converted(gloo_pool, tmp_path):
    gloo_pool(1).run(train_and_save, tiny_config(str(tmp_path), 0), 1)
    folder = tmp_path / "checkpoints/step-00000001"
    to_safetensors(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        to_safetensors(folder, tmp_path / "out")
    flip(folder)
    with pytest.raises(CheckpointError, match="checksum differs"):
        to_safetensors(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def command(*arguments: object):
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])


def test_the_command_lists_verifies_and_converts(gloo_pool, tmp_path):
    for step in (1, 2):
        gloo_pool(1).run(train_and_save, tiny_config(str(tmp_path), 0), step)
    listed = command(tmp_path)
    assert listed.exit_code == 0
    assert listed.output.count("complete") == 2
    assert command(tmp_path, "--verify").output.count("verified") == 2
    assert command(tmp_path, "--step", 1, "--to-safetensors", tmp_path / "plain").exit_code == 0
    assert load_file(tmp_path / "plain/optimizer.safetensors")["head.weight.step"].item() == 1
    assert command(tmp_path, "--to-universal", tmp_path / "universal").exit_code == 0
    assert (tmp_path / "universal/latest_universal").read_text() == "step-00000002"
    flip(tmp_path / "checkpoints/step-00000002")
    assert command(tmp_path).exit_code == 0
    failed = command(tmp_path, "--verify")
    assert isinstance(failed.exception, CheckpointError)
    assert failed.exception.exit_code == 4
    assert "rank-00000.pt is damaged" in str(failed.exception)
    assert command(tmp_path, "--step", 7, "--to-safetensors", tmp_path / "x").exception.exit_code == 4
    assert command(tmp_path / "plain").exception.exit_code == 4


def test_the_command_tells_what_cannot_be_read_from_what_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    refuse_content(monkeypatch, save(tmp_path, 1))
    flip(save(tmp_path, 2))
    failed = command(tmp_path, "--verify")
    assert failed.exception.exit_code == 4
    assert "2 of the checkpoints" in str(failed.exception)
    assert "unreadable: " in failed.output
    assert "damaged: " in failed.output


def test_the_command_prunes_what_the_config_does_not_keep(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(save(tmp_path, 4))
    (tmp_path / "config.yaml").write_text("run: {dir: here}\ndata: {root: there}\n")
    result = command(tmp_path, "--prune", "--keep-last", 1)
    assert result.exit_code == 0, result.exception
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000003"]
    assert json.loads((tmp_path / "checkpoints/step-00000003/manifest.json").read_text())["step"] == 3
    assert command(tmp_path, "--keep-last", 1).exception.exit_code == 2
    assert command(tmp_path, "--step", 3).exception.exit_code == 2


def test_a_run_that_trains_is_not_pruned(tmp_path):
    """It may finish a checkpoint at any moment, which would count as one beyond the newest good one."""
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "config.yaml").write_text("run: {dir: here}\ndata: {root: there}\n")
    training = RunLock(tmp_path, this_process(None))
    training.acquire()
    refused = command(tmp_path, "--prune", "--keep-last", 1)
    assert isinstance(refused.exception, RunFolderError)
    assert f"RUN={tmp_path} is being written by process {os.getpid()}" in str(refused.exception)
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2
    training.release()
    assert command(tmp_path, "--prune", "--keep-last", 1).exit_code == 0
    assert command(tmp_path, "--prune", "--keep-last", 1).exit_code == 0, "the lock was given back"

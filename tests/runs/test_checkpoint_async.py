"""Saving behind the loop: slow ranks, refusals, one save at a time, buffers used again."""

import errno
import json
import threading
import time
from pathlib import Path

import pytest
import torch

from medvlp import distributed
from medvlp.config import CheckpointConfig
from medvlp.runs import checkpoint_files
from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.checkpoint_writer import CheckpointWriter, DiskTask
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import Manifest
from medvlp.runs.state_files import StateFile, WriteGivenUpError
from medvlp.training.checkpointing import HostCopies
from tests.training.runs import read_metrics, train, train_expecting_error


class SlowFile(StateFile):
    """Waits before it writes."""

    def write(self, given_up=lambda: False):
        deadline = time.monotonic() + self.content["seconds"]
        while time.monotonic() < deadline:
            if given_up():
                raise WriteGivenUpError("given up")
            time.sleep(0.01)
        return super().write(given_up)


def begin(writer: CheckpointWriter, step: int, seconds: float) -> None:
    folder = checkpoint_files.partial_folder(writer.checkpoints, step)
    file = SlowFile(folder / f"rank-{distributed.rank()}.pt", {"seconds": seconds})
    writer.start([file], Manifest(step, 0, distributed.world_size(), 0, "fp32", 8, "hash"))


def save_with_a_slow_rank(run_dir: str) -> tuple[list[bool], list[float]]:
    """Whether the checkpoint was there after each of the loop's next steps, and how long they took."""
    distributed.initialize()
    writer = CheckpointWriter(Path(run_dir) / "checkpoints", CheckpointConfig())
    writer.clear()
    begin(writer, 5, 1.0 if distributed.rank() == 1 else 0.0)
    there, seconds = [], []
    for _ in range(40):
        started = time.monotonic()
        writer.poll()
        distributed.mean_over_ranks([1.0])  # the loop's own collectives go on between
        seconds.append(time.monotonic() - started)
        there.append((writer.checkpoints / "step-00000005/manifest.json").exists())
        distributed.barrier()
        time.sleep(0.1)
        if not writer.busy:
            break
    writer.wait()
    return there, seconds


@pytest.mark.dist
def test_the_loop_goes_on_while_one_rank_writes_slowly(gloo_pool, tmp_path):
    for there, seconds in gloo_pool(2).run(save_with_a_slow_rank, str(tmp_path)):
        assert there[:5] == [False] * 5, "finished before the slow rank's file was durable"
        assert there[-1]
        assert max(seconds) < 0.9, "the loop waited for the slow rank"
    manifest = json.loads((tmp_path / "checkpoints/step-00000005/manifest.json").read_text())
    assert set(manifest["files"]) == {"rank-0.pt", "rank-1.pt"}
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000005\n"


def fail_on_one_rank(run_dir: str) -> tuple[list[str], bool]:
    """Error texts of a save whose rank 1 cannot write, and whether a later one works."""
    distributed.initialize()
    writer = CheckpointWriter(Path(run_dir) / "checkpoints", CheckpointConfig(retries=1, retry_seconds=0.05))
    begin(writer, 5, 0.0)
    writer.wait()
    folder = checkpoint_files.partial_folder(writer.checkpoints, 6)
    path = folder / f"rank-{distributed.rank()}.pt"
    if distributed.rank() == 1:
        folder.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/full")
    writer.start([StateFile(path, {"weight": torch.zeros(100)})], Manifest(6, 0, 2, 0, "fp32", 8, "hash"))
    texts = []
    try:
        writer.wait()
    except CheckpointError as error:
        texts.append(str(error))
    distributed.barrier()
    clean = not folder.exists()
    begin(writer, 7, 0.0)
    writer.wait()
    return texts, clean


@pytest.mark.dist
def test_a_refusal_on_one_rank_is_one_error_on_all_and_leaves_the_earlier_one(gloo_pool, tmp_path):
    results = gloo_pool(2).run(fail_on_one_rank, str(tmp_path))
    assert results[0] == results[1]
    (text,), clean = results[0]
    assert "step 6 cannot be written" in text
    assert "No space left on device after 2 tries (rank 1)" in text
    assert "Earlier checkpoints are untouched" in text
    assert clean
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-00000005", "step-00000007",
    ]  # fmt: skip


def test_a_disk_that_refuses_twice_delays_only():
    calls = []

    def action(given_up):
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return "written"

    task = DiskTask(action, retries=2, retry_seconds=0.1)
    task.wait(10)
    assert (task.result, task.problem) == ("written", None)
    assert calls[1] - calls[0] >= 0.1
    assert calls[2] - calls[1] >= 0.2


def test_an_error_that_is_no_refusal_is_not_hidden(tmp_path):
    writer = CheckpointWriter(tmp_path / "checkpoints", CheckpointConfig())
    folder = checkpoint_files.partial_folder(writer.checkpoints, 1)
    writer.start([StateFile(folder / "a.pt", {"f": lambda: None})], Manifest(1, 0, 1, 0, "fp32", 8, "hash"))
    with pytest.raises(CheckpointError) as caught:
        writer.wait()
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_write_can_be_abandoned(tmp_path):
    writer = CheckpointWriter(tmp_path / "checkpoints", CheckpointConfig())
    begin(writer, 1, 60.0)
    started = time.monotonic()
    writer.abandon()
    assert time.monotonic() - started < 5
    assert not writer.busy
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert Checkpoint.find(tmp_path) is None
    writer.clear()
    assert not list((tmp_path / "checkpoints").glob(".step-*"))


def test_host_buffers_are_used_again():
    copies = HostCopies(torch.device("cpu"))
    state = {"a": torch.arange(4.0), "b": [torch.ones(2, 3).T, "text"]}
    first = copies.copy_tree("state", state)
    addresses = first["a"].data_ptr(), first["b"][0].data_ptr()
    state["a"] += 1
    assert first["a"].tolist() == [0, 1, 2, 3]
    second = copies.copy_tree("state", state)
    assert (second["a"].data_ptr(), second["b"][0].data_ptr()) == addresses
    assert second["a"].tolist() == [1, 2, 3, 4]
    assert second["b"][0].is_contiguous()
    assert copies.copy("state/a", torch.zeros(5), torch.float16).dtype == torch.float16


def train_with_a_slow_disk(overrides: list[str], seconds: float) -> int:
    """A run whose every file takes this long to write."""
    original = StateFile.write

    def slow(self, given_up=lambda: False):
        time.sleep(seconds)
        return original(self, given_up)

    StateFile.write = slow
    try:
        return train(overrides)
    finally:
        StateFile.write = original


@pytest.mark.dist
def test_saves_queue_behind_a_slow_disk_and_the_wait_is_reported(gloo_pool, overrides, tmp_path):
    options = ["checkpoint.every_steps=1", "train.steps=3", "checkpoint.keep_last=0", "zero.stage=0"]
    assert gloo_pool(1).run(train_with_a_slow_disk, overrides(*options), 0.3) == [0]
    gloo_pool(1).run(train, overrides(*options, "checkpoint.asynchronous=false", run="waiting"))
    first, second, third = read_metrics(tmp_path / "run")
    assert "checkpoint/stall_seconds" not in first
    assert second["checkpoint/wait_seconds"] < 0.1
    assert third["checkpoint/wait_seconds"] > 0.3
    assert third["checkpoint/stall_seconds"] >= third["checkpoint/wait_seconds"]
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 3
    for step in (1, 2, 3):
        name = f"checkpoints/step-{step:08d}/weights.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "waiting" / name).read_bytes()


@pytest.mark.dist
def test_a_refusal_in_the_background_stops_the_run_at_a_later_step(gloo_pool, overrides, tmp_path):
    options = ["checkpoint.every_steps=2", "checkpoint.retries=0", "zero.stage=0"]
    gloo_pool(1).run(train, overrides(*options, "train.steps=2"))
    results = gloo_pool(1).run(refuse, overrides(*options, "train.steps=8"))
    assert results[0][0] == "CheckpointError"
    assert "step 4 cannot be written" in results[0][1]
    assert Checkpoint.find(tmp_path / "run").name == "step-00000002"


def refuse(overrides: list[str]):
    """A run whose disk is full."""
    original = StateFile.write

    def full(self, given_up=lambda: False):
        raise OSError(errno.ENOSPC, "No space left on device")

    StateFile.write = full
    try:
        return train_expecting_error(overrides)
    finally:
        StateFile.write = original


@pytest.mark.dist
def test_the_clock_saves_too(gloo_pool, overrides, tmp_path):
    options = ["checkpoint.every_minutes=0.000001", "checkpoint.keep_last=0", "train.steps=3"]
    gloo_pool(2).run(train, overrides(*options))
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 3

"""A disk that is full: one clear error, earlier checkpoints and the stored config stay."""

import errno
import io
import resource
from pathlib import Path

import pytest
import torch

from medvlp.runs.errors import RunFolderError
from medvlp.runs.metrics_file import MetricsFile
from medvlp.runs.state_files import StateFile, _CheckedFile, _save
from tests.training.runs import read_metrics, train, train_expecting_error

FULL = Path("/dev/full")


class SmallDisk(io.BytesIO):
    """Takes `room` bytes, then says what a full disk says."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_torch_does_not_hide_a_full_disk(room):
    with pytest.raises(OSError, match="No space left"):
        _save({"weight": torch.zeros(3000)}, _CheckedFile(SmallDisk(room)))


def test_other_errors_of_saving_stay_what_they_are():
    with pytest.raises(AttributeError):
        _save({"function": lambda: None}, _CheckedFile(io.BytesIO()))


def test_a_state_file_reports_a_full_disk(tmp_path):
    for suffix in ("pt", "safetensors"):
        path = tmp_path / f"state.{suffix}"
        path.symlink_to(FULL)
        with pytest.raises(OSError, match="No space left"):
            StateFile(path, {"weight": torch.zeros(100_000)}).write()


def test_metrics_on_a_full_disk_are_one_clear_error(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file._file.close()
    file._file = FULL.open("w")
    with pytest.raises(RunFolderError, match=r"cannot write .*metrics\.jsonl: No space left"):
        file.write({"step": 1.0})


def train_with_file_limit(overrides: list[str], limit: int):
    """A run in a process that may not write files larger than `limit` bytes."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return train_expecting_error(overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.dist
def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one_and_no_debris(gloo_pool, overrides, tmp_path):
    pool = gloo_pool(2)
    options = overrides("checkpoint.keep_last=0", "checkpoint.retries=1", "checkpoint.retry_seconds=0.1")
    assert pool.run(train, [*options, "train.steps=1"]) == [0, 0]
    errors = pool.run(train_with_file_limit, [*options, "train.steps=3"], 100_000)
    assert errors[0] == errors[1]
    kind, text, code = errors[0]
    assert (kind, code) == ("CheckpointError", 4)
    assert "cannot be written" in text
    assert "File too large after 2 tries" in text
    assert "Earlier checkpoints are untouched" in text
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert folders == ["latest", "step-00000001"]
    assert pool.run(train, [*options, "train.steps=3"]) == [0, 0]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.dist
def test_a_run_folder_on_a_full_disk_keeps_its_config(gloo_pool, overrides, tmp_path):
    pool = gloo_pool(2)
    assert pool.run(train, overrides("train.steps=1")) == [0, 0]
    config = (tmp_path / "run/config.yaml").read_text()
    errors = pool.run(train_with_file_limit, overrides("train.steps=2"), 500)
    assert errors[0] == errors[1]
    assert errors[0][0] == "RunFolderError"
    assert "tokenizer.json: File too large" in errors[0][1]  # the first that is written
    assert (tmp_path / "run/config.yaml").read_text() == config

"""Signals and the end of the time: all ranks stop at the same step, after a checkpoint."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from medvlp import distributed
from medvlp.training.callbacks import StepRecord
from medvlp.training.consensus import Consensus
from medvlp.training.interrupts import EXIT_INTERRUPTED, Interrupts
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, read_metrics, train
from tests.training.test_on_device import copying_ahead


def test_a_signal_is_noted_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Interrupts() as interrupts:
        assert not Consensus(interrupts).reach(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: Consensus(interrupts).reach(1))
    assert interrupts.stopped_by == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_a_second_signal_ends_the_process_but_not_the_same_request_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from medvlp.training import interrupts as module

    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(module, "SAME_REQUEST_SECONDS", 0.2)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: interrupts._received)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGUSR1)  # Slurm's warning, late: no hurry
        time.sleep(0.1)
        assert ended == []
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: ended)
    assert ended == [128 + signal.SIGINT]


def test_the_time_is_a_request_too() -> None:
    with Interrupts(max_minutes=60) as interrupts:
        assert not Consensus(interrupts).reach(1)
    with Interrupts(max_minutes=0) as interrupts:
        assert Consensus(interrupts).reach(1)
    assert interrupts.stopped_by == "train.max_minutes"


def train_and_signal_one_rank(overrides: list[str], asked_at: int) -> int:
    """A run in which rank 1 gets SIGTERM during step `asked_at`; the next batch has been read by then."""
    from medvlp.training import trainer

    original = trainer.Trainer._train_step

    def step(self: trainer.Trainer) -> StepRecord:
        if self.step + 1 == asked_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with mock.patch.object(trainer.Trainer, "_train_step", step), copying_ahead():
        return train(overrides)


@pytest.mark.dist
def test_a_signal_to_one_rank_saves_on_all_and_resuming_is_identical(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    options = ["text.dropout=0.2", "train.steps=5"]
    pool = gloo_pool(2)
    assert pool.run(train_and_signal_one_rank, overrides(*options), 2) == [EXIT_INTERRUPTED] * 2
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-00000003"
    assert pool.run(train, overrides(*options)) == [0, 0]
    pool.run(train, overrides(*options, run="whole"))
    names = "checkpoints/step-00000005/weights.safetensors"
    assert (tmp_path / "run" / names).read_bytes() == (tmp_path / "whole" / names).read_bytes()
    assert len(read_metrics(tmp_path / "run")) == 5
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["step"]) for event in events] == [
        ("start", 0), ("interrupt", 3), ("resume", 3), ("finish", 5),
    ]  # fmt: skip
    assert events[1]["by"] == "SIGTERM"
    assert events[2]["checkpoint"] == "step-00000003"


@pytest.mark.dist
def test_a_signal_in_the_step_that_ends_a_run_early_is_heard(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    """An evaluation that trains heads would begin the next training."""
    early = [
        "validation.every_steps=1", "checkpoint.keep_best=valid/loss", "train.patience=1", "train.steps=9",
        "optimizer.lr=1e-30",  # so that nothing is better than the first
    ]  # fmt: skip
    pool = gloo_pool(2)
    assert pool.run(train_and_signal_one_rank, overrides(*early), 2) == [EXIT_INTERRUPTED] * 2
    assert pool.run(train, overrides(*early)) == [0, 0]
    assert len(read_metrics(tmp_path / "run")) == 2  # it had ended

"""Signals and losses that are not finite: all ranks stop at the same step."""

import os
import signal

import pytest
import torch

from medvlp import distributed
from medvlp.config import Config
from medvlp.training.interrupts import EXIT_INTERRUPTED, Interrupts
from tests.training.runs import read_metrics, train
from tests.training.tiny import TinyMethod, random_batch


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with Interrupts() as interrupts:
        assert not interrupts.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupts.agreed()
    assert interrupts.stopped_by == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def train_and_signal_one_rank(overrides: list[str], stop_at: int) -> int:
    """A run in which rank 1 gets SIGTERM during step `stop_at`."""
    from medvlp.training import trainer

    original = trainer.Trainer._train_step

    def step(self):
        if self.step + 1 == stop_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    trainer.Trainer._train_step = step
    try:
        return train(overrides)
    finally:
        trainer.Trainer._train_step = original


@pytest.mark.dist
def test_a_signal_to_one_rank_saves_on_all_and_resuming_is_identical(gloo_pool, overrides, tmp_path):
    options = ["text.dropout=0.2", "train.steps=5"]
    pool = gloo_pool(2)
    assert pool.run(train_and_signal_one_rank, overrides(*options), 3) == [EXIT_INTERRUPTED] * 2
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-00000003"
    assert pool.run(train, overrides(*options)) == [0, 0]
    pool.run(train, overrides(*options, run="whole"))
    names = "checkpoints/step-00000005/weights.safetensors"
    assert (tmp_path / "run" / names).read_bytes() == (tmp_path / "whole" / names).read_bytes()
    assert len(read_metrics(tmp_path / "run")) == 5


class Exploding(TinyMethod):
    """Its loss becomes NaN on rank 1 at the third step (after that the weights would be NaN)."""

    def forward(self, batch):
        outputs = super().forward(batch)
        if distributed.rank() == 1 and self.progress[-1][1] == 2:
            outputs["loss"] = outputs["loss"] * torch.nan
        return outputs


def explode(run_dir: str, log_every: int) -> tuple[str, list[str], list[tuple[int, int]]]:
    """Error text, checkpoints left, and the calls of `on_progress`."""
    from pathlib import Path

    import numpy as np

    from medvlp.training.batch_plan import plan_batch
    from medvlp.training.checkpointing import CheckpointCallback
    from medvlp.training.engine import Engine
    from medvlp.training.errors import NotFiniteError
    from medvlp.training.finite import FiniteCheck
    from medvlp.training.trainer import Trainer

    config = Config()
    config.run.dir, config.data.root = run_dir, ""
    config.train.global_batch, config.precision, config.checkpoint.every_steps = 8, "fp32", 2
    device = distributed.initialize()
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(0)
    method = Exploding()
    engine = Engine(method, config, plan_batch(config, world_size), device)
    check = FiniteCheck([config.checkpoint.every_steps], gradient=True, advice="Look at them.")
    saving = CheckpointCallback(config, engine, [check])
    batches = (random_batch(step, 8, rank, world_size) for step in range(100))
    trainer = Trainer(engine, batches, np.full(20, 1e-3), 3, [check, saving], log_every=log_every)
    text = ""
    try:
        with Interrupts() as interrupts:
            trainer.train(interrupts)
    except NotFiniteError as error:
        text = str(error)
    engine.close()
    return text, sorted(path.name for path in Path(run_dir, "checkpoints").glob("step-*")), method.progress


@pytest.mark.dist
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_it_is_saved(gloo_pool, tmp_path, log_every):
    results = gloo_pool(2).run(explode, str(tmp_path), log_every)
    assert results[0] == results[1]
    text, checkpoints, progress = results[0]
    assert "not finite at step 3" in text
    assert "0002-0004, 0002-0005, 0002-0006, 0002-0007" in text
    assert text.endswith("Look at them.")
    assert checkpoints == ["step-00000002"]
    assert progress[:4] == [(0, 0), (0, 1), (0, 2), (1, 3)][: len(progress)]

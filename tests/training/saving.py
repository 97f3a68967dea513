"""What the processes of the gloo pool do in tests of checkpoints: a tiny engine that trains, saves, loads."""

from __future__ import annotations

import torch

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch_sizes import divide_batch
from medvlp.runs.checkpoint import Checkpoint
from medvlp.training.checkpointing import CheckpointCallback
from medvlp.training.engine import Engine
from tests.training.runs import OptimizerName, Precision
from tests.training.tiny import TinyMethod, random_batch

BATCH = 12


def tiny_config(
    run_dir: str, stage: int, precision: Precision = "fp32", optimizer: OptimizerName = "adamw"
) -> Config:
    """Of a run with a global batch of 12; keeps every checkpoint."""
    config = Config()
    config.run.dir, config.data.root = run_dir, ""
    config.train.global_batch, config.precision, config.zero.stage = BATCH, precision, stage
    config.checkpoint.keep_last, config.checkpoint.retry_seconds = 0, 0.01
    config.optimizer.name = optimizer
    return config


def start(config: Config, checkpoint: Checkpoint | None = None) -> tuple[Engine, CheckpointCallback]:
    """An engine around `TinyMethod`, from `checkpoint` if there is one."""
    device = distributed.initialize()
    torch.manual_seed(0)
    method = TinyMethod()
    if checkpoint is not None:
        checkpoint.weights_into(method)
    engine = Engine(method, config, divide_batch(config, distributed.world_size()), device)
    saving = CheckpointCallback(config, engine, [])
    if checkpoint is not None:
        saving.load(checkpoint)
    return engine, saving


def train_steps(engine: Engine, first: int, last: int) -> list[float]:
    """Losses of steps `first` to `last`, whose batches depend on nothing but the step."""
    losses = []
    for step in range(first, last + 1):
        engine.set_learning_rate(1e-3)
        batch = random_batch(step, BATCH, distributed.rank(), distributed.world_size())
        loss = engine.forward(batch).loss
        engine.backward(loss)
        engine.step()
        losses += distributed.mean_over_ranks([float(loss.detach())])
    return losses


def train_and_save(config: Config, step: int) -> list[float]:
    """Train a new engine for some steps and save it."""
    engine, saving = start(config)
    losses = train_steps(engine, 1, step)
    saving.save(step, 0)
    saving._writer.wait()
    engine.close()
    return losses


def load_and_save(config: Config, out: str, steps: int = 0) -> list[float]:
    """Load the newest checkpoint, save it as it is into the run folder `out`, then train on."""
    checkpoint = Checkpoint.find(config.run.dir)
    assert checkpoint is not None
    config.run.dir = out
    engine, saving = start(config, checkpoint)
    step = checkpoint.step
    saving.save(step, 0)
    saving._writer.wait()
    losses = train_steps(engine, step + 1, step + steps)
    engine.close()
    return losses

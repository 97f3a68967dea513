"""The training loop. It knows no method, no logger and no file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from medvlp.data.batch import Batch
from medvlp.methods.base import Progress
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.engine import Engine
from medvlp.training.interrupts import Interrupts


class Trainer:
    """Trains a method from a finished step to the last one.

    Args:
        engine: DeepSpeed around the method.
        batches: this rank's micro-batches, from the first one of the next step on.
        learning_rates: [steps] learning rate of every step.
        steps_per_epoch: steps after which a new epoch begins.
        callbacks: called in order after every step.
        log_every: steps between those at which metrics are read.
        step: finished steps.
    """

    def __init__(
        self,
        engine: Engine,
        batches: Iterator[Batch],
        learning_rates: NDArray[np.float64],
        steps_per_epoch: int,
        callbacks: Sequence[Callback],
        log_every: int = 1,
        step: int = 0,
    ):
        self.engine = engine
        self.batches = batches
        self.learning_rates = learning_rates
        self.steps_per_epoch = steps_per_epoch
        self.callbacks = callbacks
        self.log_every = log_every
        self.step = step

    def train(self, interrupts: Interrupts) -> None:
        """Run until the last step, or until the ranks agree on an interrupt."""
        self.engine.method.train()
        try:
            for callback in self.callbacks:
                callback.on_start(self.step)
            while self.step < len(self.learning_rates):
                record = self._train_step()
                finished = self.step == len(self.learning_rates)
                record.last = interrupts.agreed() or finished
                for callback in self.callbacks:
                    callback.on_step(record)
                if record.last:
                    break
        finally:
            for callback in reversed(self.callbacks):
                callback.on_end()

    def _train_step(self) -> StepRecord:
        started = time.perf_counter()
        epoch, learning_rate = self.step // self.steps_per_epoch, float(self.learning_rates[self.step])
        logged = (self.step + 1) % self.log_every == 0 or self.step + 1 == len(self.learning_rates)
        self.engine.method.on_progress(Progress(epoch, self.step, len(self.learning_rates)))
        self.engine.set_learning_rate(learning_rate)
        accumulation = self.engine.plan.accumulation
        losses: dict[str, torch.Tensor] = {}
        keys: list[str] = []
        skipped, waited = 0, 0.0
        for _ in range(accumulation):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - asked
            keys += batch.keys
            skipped += batch.skipped
            outputs = self.engine.forward(batch.to(self.engine.device))
            self.engine.backward(outputs["loss"])
            self.engine.step()
            for name, value in outputs.items():
                share = value.detach().float() / accumulation
                losses[name] = losses[name] + share if name in losses else share
            for callback in self.callbacks:
                callback.on_micro_batch(batch.sample, self.step)
        self.step += 1
        return StepRecord(
            step=self.step,
            epoch=epoch,
            last=False,
            logged=logged,
            losses=losses,
            keys=keys,
            learning_rate=learning_rate,
            samples=self.engine.plan.global_batch,
            skipped=skipped,
            seconds=time.perf_counter() - started,
            data_seconds=waited,
            engine=self.engine,
        )

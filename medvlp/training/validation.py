"""Validation while training: losses and metrics of another split, the best checkpoint, early stopping."""

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from medvlp import distributed
from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.batch import Batch
from medvlp.data.loader import evaluation_dataset
from medvlp.methods.base import StepOutput
from medvlp.prototypes.table import PrototypeTable
from medvlp.runs.agreement import together
from medvlp.runs.errors import AgreedError
from medvlp.runs.identity import DataRecord
from medvlp.runs.manifest import VALIDATION_PREFIX as PREFIX
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.device_memory import naming_validation
from medvlp.training.engine import Engine
from medvlp.training.predictions import predict
from medvlp.training.recipe import Recipe, TrainingSet
from shards.errors import NotFiniteError

logger = logging.getLogger(__name__)


def interval(config: Config, steps_per_epoch: int) -> int:
    """Steps between two validations; 0: there are none."""
    validation = config.validation
    epochs = round(validation.every_epochs * steps_per_epoch)
    return max(validation.every_steps, epochs, 1 if validation.every_epochs > 0 else 0)


class Validation(Callback):
    """Measures `validation.split` every so many steps and after the last one.

    Where `checkpoint.keep_best` names one of its metrics it has a better value saved, and ends training
    after `train.patience` validations without one. All ranks get the same numbers and so decide alike.

    Args:
        recipe: measures predictions.
        engine: the network.
        learned: what the run learns from; the split is of the same dataset.
        every: steps between two.
        log: takes the metrics.

    Attributes:
        alive: called with a place and the finished steps, so that nobody takes this rank for dead.
        clusters: gives those of the prototype service.
        measured_on: fingerprint of what the metrics are of: samples, and how many are compared.

    Raises:
        AgreedError: on all ranks: the dataset has no such split, or one of them cannot read it.
    """

    name = "validation"

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        learned: TrainingSet,
        every: int,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        config, reader, tokenizer = recipe.config, learned.reader, learned.tokenizer
        self.recipe, self.engine, self.learned, self.every, self.log = recipe, engine, learned, every, log
        split = config.validation.split
        self.dataset = together(lambda: evaluation_dataset(config, reader, tokenizer, split, recipe.fields))
        # Those of rank 0: ranks may not have been able to read the same samples of their copies.
        own = together(lambda: recipe.validated(reader, self.dataset.store).tolist())
        self.positions = np.array(distributed.broadcast_object(own), dtype=np.int64)
        self.clusters: Callable[[], PrototypeTable | None] = lambda: None
        self.alive: Callable[[str, int], None] = lambda place, step: None
        self._best: float | None = None
        self._without = 0
        # Values of another metric, or measured on others, say nothing about later ones.
        content = DataRecord.of(reader.index, split).content
        measured_on = [
            split,
            config.validation.batch,
            content,
            xxhash.xxh3_64_hexdigest(self.positions.tobytes()),
        ]
        self.measured_on = xxhash.xxh3_64_hexdigest(json.dumps(measured_on).encode())
        self._of = [config.checkpoint.keep_best, config.checkpoint.best_mode, *measured_on]

    @property
    def finished(self) -> bool:
        """Whether as many validations as `train.patience` allows have brought nothing better."""
        patience = self.recipe.config.train.patience
        return patience is not None and self._without >= patience

    def on_start(self, step: int) -> None:
        """Say why nothing is trained where training had ended before."""
        if self.finished:
            self._tell_end(step)

    def on_step(self, record: StepRecord) -> None:
        """Validate when it is time; a validation ends with a line of metrics.

        An interrupt is not a time: a resumed run would have one validation more than an uninterrupted one.
        """
        if not (record.step % self.every == 0 or record.finished):
            return
        started = time.monotonic()
        measured = self._measure(record.step)
        found = {name: value for name, value in measured.items() if math.isfinite(value)}
        seconds = distributed.greatest_over_ranks([time.monotonic() - started])[0]
        record.logged = True
        if distributed.is_main():
            # Single terms and findings are in metrics.jsonl.
            short = [name for name in found if "/" not in name or name.endswith(("/macro", "/R@5"))]
            told = ", ".join(f"{name} {found[name]:.4g}" for name in short)
            logger.info("validation after step %d: %s (%.1f s)", record.step, told, seconds)
        self.log({PREFIX + name: value for name, value in found.items()} | {PREFIX + "seconds": seconds})
        self._judge(record, found, measured)

    def _measure(self, step: int) -> Mapping[str, float]:
        config = self.recipe.config
        arrays_of = self.recipe.examination(self.engine.objective, self.learned)
        table = self.clusters()
        clusters = None if table is None else table.uncounted()

        def examine(batch: Batch) -> tuple[StepOutput, Mapping[str, Tensor]]:
            with naming_validation(config):
                return self.engine.forward(batch, clusters), arrays_of(batch)

        predictions = predict(
            self.engine.objective,
            examine,
            self.dataset,
            self.positions,
            config.validation.batch,
            self.engine.device,
            config.train.seed,
            lambda: self.alive("validation", step),
        )
        metrics: dict[str, float] = {}
        if distributed.is_main():  # once: a library's sums may differ between machines
            try:
                measured = self.recipe.measure(predictions, self.learned)
                metrics = {name: float(value) for name, value in measured.items()}
            except NotFiniteError as error:  # as a bad step: the training may find back
                logger.warning("the validation after step %d has losses alone: %s", step, error)
                best = (config.checkpoint.keep_best or "").removeprefix(PREFIX)
                metrics = {} if best in predictions.losses else {best: math.nan}  # measured, and no better
        return predictions.losses | dict(distributed.broadcast_object(metrics))

    def _judge(self, record: StepRecord, found: Mapping[str, float], measured: Collection[str]) -> None:
        """Save where it is better; end the training where nothing has been for long.

        Raises:
            AgreedError: patience would wait for what is not `measured`, and end the training for nothing.
        """
        config = self.recipe.config
        best = config.checkpoint.keep_best
        if best is None or not best.startswith(PREFIX):
            return
        sign = 1.0 if config.checkpoint.best_mode == "max" else -1.0
        name = best.removeprefix(PREFIX)
        value = found.get(name)
        if value is not None and (self._best is None or sign * value > sign * self._best):
            self._best, self._without = value, 0
            record.save = True
        elif name in measured:
            self._without += 1
            if self.finished and not record.last:
                record.last = True
                self._tell_end(record.step)
        elif config.train.patience is not None and not (record.finished or config.optimizer.phases):
            raise AgreedError(  # not where a later phase may measure it, nor before the last checkpoint
                f"checkpoint.keep_best={best} is nothing that validations on {config.validation.split} "
                f"measure, and train.patience={config.train.patience} would end the training for want of it: "
                f"name one of {', '.join(PREFIX + given for given in sorted(measured))}",
                ConfigError.exit_code,
            )

    def _tell_end(self, step: int) -> None:
        if distributed.is_main():
            logger.info(
                "training ends after step %d: the last %d validations brought no better %s (train.patience)",
                step, self._without, self.recipe.config.checkpoint.keep_best,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Best value so far, validations since, and what they are of."""
        return {"best": self._best, "without": self._without, "of": self._of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`; what is of another metric, split, chunk or dataset is forgotten."""
        known = state.get("of", [])  # states of earlier versions do not say it, or not all
        if known == self._of[: len(known)]:
            self._best, self._without = state.get("best"), state.get("without", 0)
        elif state["best"] is not None and distributed.is_main():
            logger.info(
                "the best %s so far does not count: another metric, split, batch or dataset is validated now",
                state["of"][0],
            )

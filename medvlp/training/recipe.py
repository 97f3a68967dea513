"""What a run trains: the one thing that pre-training and the training of a downstream task do not share."""

import abc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.data.loader import TrainingLoader
from medvlp.data.order import Positions
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Objective
from medvlp.training.predictions import Predictions
from shards.reader import ShardReader

#: Keys of `data` that say which samples are drawn and in which order they come.
_ORDER = (
    "split", "shuffle_block", "partitions", "tail", "images_per_study", "views", "sections", "cleaning",
    "min_sentences", "min_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingSet:
    """What is learned from.

    Attributes:
        config: of the run; its `data.split` is the split.
        reader: the dataset.
        samples: positions in the split that are drawn, ascending; None: all with a text.
        tokenizer: of the run.
    """

    config: Config
    reader: ShardReader
    samples: Positions | None
    tokenizer: Tokenizer


class Recipe(abc.ABC):
    """What a run trains, on what, and what it begins with; engine, loop and checkpoints know no more of it.

    Every rank has one, made from the config alone, so that a start and a resume agree.

    Attributes:
        config: of the run.
        fields: batch fields the objective reads (`medvlp.data.fields`).
    """

    def __init__(self, config: Config, fields: frozenset[str] = frozenset()) -> None:
        self.config, self.fields = config, fields

    @abc.abstractmethod
    def build(self, data: TrainingSet) -> Objective:
        """The objective on the CPU in float32, drawn from the default generators, which are seeded.

        The config in `data` is that of the run; resumed, it does not say where weights were found at the
        start, because the checkpoint holds them all.
        """

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer a new run begins with; None: that of `data.tokenizer`."""
        return None

    def samples(self, reader: ShardReader, tokenizer: Tokenizer) -> Positions | None:
        """See `TrainingSet.samples`; the same on all ranks."""
        return None

    def start(self, objective: Objective, batches: Callable[[], TrainingLoader]) -> None:
        """Before the first step of a new run, on the device; a collective. Weights are not sharded yet."""
        return

    def validated(self, reader: ShardReader, store: SampleStore) -> Positions:
        """Positions in `validation.split` that are measured while training."""
        return np.flatnonzero(store.trainable())

    def examination(self, objective: Objective, data: TrainingSet) -> Callable[[Batch], Mapping[str, Tensor]]:
        """What one validation does with each batch, to give what `measure` needs of its samples.

        Returns:
            batch on the device -> arrays [B, ...], of the same trailing shapes in every batch; it is called
            without gradient and in evaluation mode.
        """
        return lambda batch: {}

    def measure(self, predictions: Predictions, data: TrainingSet) -> Mapping[str, float]:
        """Metrics of the predictions of the validation split; on rank 0 alone."""
        return {}

    def started_from(self) -> Mapping[str, str]:
        """Checksums of weights that a new run begins with, for its identity, beside published ones."""
        return {}

    def start_origin(self) -> Mapping[str, str]:
        """Where these come from, as far as it is known (see `RunIdentity.start_origin`)."""
        return {}

    def lesson(self) -> Mapping[str, str]:
        """What is learned beside what the method says, by config key: a run folder is of one lesson.

        By default what the order of samples follows from: in another one some come twice and others never.
        """
        data = {f"data.{name}": getattr(self.config.data, name) for name in _ORDER}
        values = {"train.seed": self.config.train.seed, **data}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

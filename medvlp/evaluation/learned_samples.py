"""Which samples of a split a task that trains can learn from, and which of them a unit learns from."""

from __future__ import annotations

import numpy as np

from medvlp.config import Config
from medvlp.data.order import Positions
from medvlp.data.sample_store import SampleStore
from medvlp.evaluation.splits import stratified_fraction
from medvlp.evaluation.task import EvaluationError
from medvlp.evaluation.trained import TrainedTask
from shards.reader import ShardReader


def draw(task: TrainedTask, reader: ShardReader, config: Config, store: SampleStore) -> Positions:
    """The samples of `finetune.fraction` of the patients that have something to learn, by `train.seed`."""
    split = config.data.split
    rows = learnable(task, reader, split, store)
    if not len(rows):
        raise EvaluationError(f"{task.name}: no sample of split {split} has {task.teaches}")
    names = reader.index.label_names
    columns = [names.index(name) for name in task.findings(names)]
    patients = np.array([reader.metadata(split, int(row))["patient_id"] for row in rows])
    labels = store.labels[rows][:, columns]
    return rows[stratified_fraction(patients, labels, config.finetune.fraction, config.train.seed)]


def learnable(task: TrainedTask, reader: ShardReader, split: str, store: SampleStore) -> Positions:
    """The readable samples of a split that the task can learn from or be measured on."""
    readable = np.ones(len(store), dtype=bool)
    readable[store.unreadable] = False
    return np.flatnonzero(task.learnable(reader, split, store) & readable)

"""Loaders: which rows a rank reads at which step."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch.utils.data import Sampler

from medvlp.config import Config, DataConfig
from medvlp.config_files import ConfigError
from medvlp.data.augment import moves_freely
from medvlp.data.batch import Batch
from medvlp.data.dataset import EvaluationDataset, TrainingDataset
from medvlp.data.faults import FaultCounter
from medvlp.data.fields import open_fields
from medvlp.data.order import Positions, SampleOrder, StudyImages, rank_rows
from medvlp.data.rules import told
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.data.workers import WorkerLoader
from medvlp.device import uses_cuda
from medvlp.ranks import detect, threads_of_rank
from shards.errors import DataError
from shards.reader import ShardReader

logger = logging.getLogger(__name__)

#: Share of the reports that may lose their end without a warning: those of published methods do.
_MOST_CUT = 0.2

#: Tokens of whose multiples reports are long where a model is compiled.
_COMPILED_MULTIPLE = 32
#: Data workers of a rank, where the config does not say it.
_FEWEST, _MOST = 2, 8


class MicroBatchSampler(Sampler[tuple[int, Positions]]):
    """(epoch, positions) of every micro-batch of one rank, from a step on and without end."""

    def __init__(
        self,
        order: SampleOrder,
        trainable: Positions,
        config: Config,
        world_size: int,
        rank: int,
        micro_batch: int,
        start_step: int,
        studies: StudyImages | None = None,
    ) -> None:
        """Take an order over `trainable`, the positions in the split that may be drawn.

        With `studies` each of them stands for its study, of which one image is drawn.

        Raises:
            ConfigError: the global batch does not fit the order or does not divide.
        """
        self.order = order
        self.trainable = trainable
        self.studies = studies
        self.batch = config.train.global_batch
        self.tail = config.data.tail
        self.accumulation, rest = divmod(self.batch, micro_batch * world_size)
        if rest:
            raise ConfigError(
                f"train.global_batch ({self.batch}) must be a multiple of train.micro_batch x ranks "
                f"({micro_batch} x {world_size})"
            )
        self.world_size = world_size
        self.rank = rank
        self.start_step = start_step
        self.steps_per_epoch = order.steps_per_epoch(self.batch, self.tail)
        self._rows(np.arange(self.batch))

    def fingerprint(self) -> str:
        """Of the samples in the order; ranks that differ in it would draw some twice and others never."""
        drawn = [self.trainable] if self.studies is None else [self.trainable, self.studies.members]
        return xxhash.xxh3_64_hexdigest(b"".join(positions.tobytes() for positions in drawn))

    def _rows(self, positions: Positions) -> list[Positions]:
        return rank_rows(positions, self.order.partitions, self.accumulation, self.world_size, self.rank)

    def __iter__(self) -> Iterator[tuple[int, Positions]]:
        step = self.start_step
        while True:
            epoch, drawn = self.order.batch(step, self.batch, self.tail)
            positions = self.trainable[drawn]
            for rows in self._rows(
                positions if self.studies is None else self.studies.draw(epoch, positions)
            ):
                yield epoch, rows
            step += 1


class TrainingLoader:
    """An endless stream of this rank's micro-batches; `accumulation` of them make one step.

    Attributes:
        steps_per_epoch: global batches of an epoch.
        samples: samples of an epoch: those of the split that pass the rules, or one for each study.
        accumulation: micro-batches of a step.
        drawn: fingerprint of the samples that are drawn; with the step it says which come next.
        unreadable: how many samples of the split could not be read when its store was made.
    """

    def __init__(self, dataset: TrainingDataset, sampler: MicroBatchSampler, config: DataConfig) -> None:
        self.samples = len(sampler.trainable)
        self.steps_per_epoch = sampler.steps_per_epoch
        self.accumulation = sampler.accumulation
        self.drawn = sampler.fingerprint()
        self.unreadable = len(dataset.store.unreadable)
        rows = sampler.batch // (sampler.accumulation * sampler.world_size)
        self._loader = WorkerLoader(dataset, sampler, config, data_workers(config), rows)
        self._faults = FaultCounter(config.max_bad_fraction, self.samples, sampler.world_size, replaced=True)

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches from the start step on.

        Raises:
            DataError: too many corrupt samples.
        """
        for batch in self._loader:
            self._faults.count(batch)
            yield batch


def build_loader(
    config: Config,
    reader: ShardReader,
    tokenizer: Tokenizer,
    rank: int,
    world_size: int,
    micro_batch: int,
    start_step: int = 0,
    fields: Iterable[str] = (),
    samples: Positions | None = None,
) -> TrainingLoader:
    """The training loader of one rank.

    The samples of a step depend on nothing but the dataset, `train.seed`, the step and `train.global_batch`;
    starting at a later step costs no reading.

    Args:
        config: the run.
        reader: the dataset (`medvlp.data.cache.open_reader`).
        tokenizer: tokenizer of the text encoder.
        rank, world_size: place of this process.
        micro_batch: samples of one forward pass on this rank.
        start_step: first optimiser step, from 0.
        fields: names of what stands in `Batch.fields` (`medvlp.data.fields`).
        samples: positions in the split that are drawn, ascending; None: all that pass the rules of `data`.

    Raises:
        ConfigError: batch and split do not fit, or nothing can be drawn.
        DataError: no such split, too many unreadable samples, or none has what a field needs.
    """
    data = _resolved(config)
    store = SampleStore.open_or_build(reader, data.split, data, tokenizer)
    opened = open_fields(fields, reader, data.split, store, tokenizer, data)
    for name, field in opened.items():
        if field.placed and moves_freely(data.transform):
            raise ConfigError(
                f"data.transform.rotate and rand_augment move what lies in an image, and the {name} that are "
                "asked for do not follow: set both to 0"
            )
        if (reason := field.missing()) is not None:
            raise DataError(
                f"{reader.root}: split {data.split!r} lacks the {name} that the method learns from: {reason}"
            )
    mask = store.trainable() if samples is None else np.isin(np.arange(len(store)), samples)
    if samples is not None and not mask.any():
        raise DataError(f"{reader.root}: no sample of split {data.split!r} can be learned from")
    if not mask.any():
        raise ConfigError(
            f"no sample of split {data.split} is left to train on: {told(store.excluded, data)}; "
            "`medvlp shards view` shows the sections there are, `medvlp shards info` the views"
        )
    if rank == 0 and samples is None:
        _tell_what_is_lost(store, mask, data)
    drawable, studies = np.flatnonzero(mask), None
    if samples is None and data.images_per_study == "one":
        studies = StudyImages(store.studies, mask, config.train.seed)
        mask = studies.first
    trainable = np.flatnonzero(mask)
    ends = np.cumsum([shard.samples for shard in reader.index.split_shards(data.split)])
    sizes = np.diff(np.concatenate([[0], np.cumsum(mask)])[np.concatenate([[0], ends])])
    order = SampleOrder(sizes.tolist(), config.train.seed, data.shuffle_block, data.partitions)
    sampler = MicroBatchSampler(order, trainable, config, world_size, rank, micro_batch, start_step, studies)
    dataset = TrainingDataset(reader, data.split, store, tokenizer, data, opened, config.train.seed, drawable)
    return TrainingLoader(dataset, sampler, data)


def _tell_what_is_lost(store: SampleStore, mask: NDArray[np.bool_], data: DataConfig) -> None:
    """Warn of samples that the rules leave out, and of reports of which the end is cut off."""
    if not mask.all():
        logger.warning(
            "%d of %d samples of split %s are not trained on: %s",
            int((~mask).sum()), len(store), data.split, told(store.excluded, data),
        )  # fmt: skip
    tokens = np.diff(store.rows.offsets)[mask] + 2  # [CLS] and [SEP]
    cut = int((tokens > data.max_tokens).sum())
    if cut > _MOST_CUT * len(tokens):
        logger.warning(
            "%d of %d reports of split %s are longer than data.max_tokens=%d and lose their end (half have "
            "%d tokens or more): raise it, or take a tokenizer that knows more words",
            cut, len(tokens), data.split, data.max_tokens, int(np.median(tokens)),
        )  # fmt: skip


class EvaluationLoader:
    """Batches of a split in order, once per iteration.

    Args:
        dataset: the split. chunks: positions of each batch. config: the `data` section.
        keeps_empty: also yield a batch whose samples are all corrupt, without samples.
        faults: counts the corrupt samples of a whole of which this is a part; None: this is the whole.
    """

    def __init__(
        self,
        dataset: EvaluationDataset,
        chunks: list[list[int]],
        config: DataConfig,
        keeps_empty: bool = False,
        faults: FaultCounter | None = None,
    ) -> None:
        self.samples = sum(len(chunk) for chunk in chunks)
        self.keeps_empty, self._config, self._whole = keeps_empty, config, faults
        workers, rows = min(data_workers(config), len(chunks)), max(map(len, chunks), default=0)
        self._loader = WorkerLoader(dataset, chunks, config, workers, rows)

    def __len__(self) -> int:
        """Number of batches, if no batch is lost to corrupt samples."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; corrupt samples are left out, counted and logged.

        Raises:
            DataError: too many corrupt samples.
        """
        faults = self._whole or FaultCounter(self._config.max_bad_fraction, self.samples, world_size=1)
        for batch in self._loader:
            faults.count(batch)
            if batch.keys or self.keeps_empty:
                yield batch


def evaluation_loader(
    config: Config,
    reader: ShardReader,
    tokenizer: Tokenizer,
    split: str,
    batch: int,
    positions: Sequence[int] | None = None,
    fields: Iterable[str] = (),
) -> EvaluationLoader:
    """A split in index order: center crop, no randomness, every sample once, the last batch may be smaller.

    Args:
        config: the run; image size, sections, cleaning and workers are used.
        reader: the dataset.
        tokenizer: tokenizer of the text encoder (of the run, whatever dataset is evaluated).
        split: which split.
        batch: samples of a batch.
        positions: only these samples of the split, in this order; default: all.
        fields: names of what stands in `Batch.fields` (`medvlp.data.fields`); samples may lack it.
    """
    chosen = list(range(reader.sample_count(split)) if positions is None else positions)
    chunks = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
    return EvaluationLoader(evaluation_dataset(config, reader, tokenizer, split, fields), chunks, config.data)


def evaluation_dataset(
    config: Config, reader: ShardReader, tokenizer: Tokenizer, split: str, fields: Iterable[str] = ()
) -> EvaluationDataset:
    """A split as `evaluation_loader` reads it."""
    data = _resolved(config)
    store = SampleStore.open_or_build(reader, split, data, tokenizer)
    opened = open_fields(fields, reader, split, store, tokenizer, data)
    return EvaluationDataset(reader, split, store, tokenizer, data, opened)


def _resolved(config: Config) -> DataConfig:
    """The `data` section with the padding of a compiled model: every further length is compiled anew."""
    multiple = config.data.pad_multiple or (_COMPILED_MULTIPLE if config.train.compile else 1)
    return replace(config.data, pad_multiple=multiple)


def data_workers(config: DataConfig) -> int:
    """Data-loading processes of this rank."""
    if config.workers is not None:
        return config.workers
    return min(_MOST, max(_FEWEST, threads_of_rank(detect()) - 1)) if uses_cuda() else _FEWEST

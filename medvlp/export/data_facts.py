"""What a model card says about the data: counts, fingerprint and licence, nothing about a patient."""

from __future__ import annotations

from dataclasses import dataclass

from medvlp.config import DataConfig
from medvlp.data.cache import open_reader
from shards.format import SplitTotals, is_remote

#: Shards of a local dataset that are asked for their licence; of a remote one it is the first alone.
ASKED_SHARDS = 32


@dataclass(frozen=True)
class DataFacts:
    """A dataset as the model card shows it.

    Attributes:
        name, fingerprint: from its index.
        split, totals: what was trained on, and its counts.
        stored_size: side of the stored square images in pixels.
        licences: `license` fields of samples, sorted; "" where a sample says nothing.
        asked: number of samples they were read from.
    """

    name: str
    fingerprint: str
    split: str
    totals: SplitTotals
    stored_size: int
    licences: list[str]
    asked: int


def read_facts(config: DataConfig) -> DataFacts:
    """Read the index of the training data and the licence of the first sample of shards spread over it.

    Raises:
        DataError: the dataset cannot be read, or lacks the split.
    """
    reader = open_reader(config)
    index = reader.index
    shards = index.split_shards(config.split)
    step = len(shards) if is_remote(config.root) else max(1, -(-len(shards) // ASKED_SHARDS))
    position, licences, asked = 0, set(), 0
    for number, shard in enumerate(shards):
        if number % step == 0 and shard.samples:
            licences.add(str(reader.metadata(config.split, position).get("license") or ""))
            asked += 1
        position += shard.samples
    reader.close()
    totals = index.splits[config.split]
    return DataFacts(
        index.name, index.fingerprint, config.split, totals, index.image_size, sorted(licences), asked
    )

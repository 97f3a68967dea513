"""A stock WebDataset reader sees in the tars what our reader sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import webdataset

from shards.reader import ShardReader


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_the_same_samples(dataset: Path) -> None:
    reader = ShardReader(dataset)
    urls = [str(dataset / shard.file) for shard in reader.index.split_shards("train")]
    stock = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(stock) == reader.sample_count("train")
    for position, sample in enumerate(stock):
        key, image, metadata = reader.read("train", position)
        assert sample["__key__"] == key
        assert sample["jpg"] == image
        assert json.loads(sample["json"]) == metadata
        assert ("masks.png" in sample) == bool(reader.masks("train", position))

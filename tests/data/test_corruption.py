"""Corrupt samples: replaced, counted, logged, and a stop when there are too many."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.data.faults import FaultCounter
from medvlp.data.loader import build_loader, evaluation_loader
from medvlp.data.text import Tokenizer
from shards.errors import DataError, UnavailableError
from shards.format import MASKS_EXTENSION
from shards.reader import ShardReader
from shards.remote import RemoteError

ConfigFactory = Callable[..., Config]


def destroy_image(root: Path, position: int, content: bytes = b"\xff\xd8 no image ") -> str:
    """Overwrite the stored image of a training sample; return its key."""
    reader = ShardReader(root)
    data = reader.image("train", position)
    shard, _ = reader.locate("train", position)
    tar = bytearray((root / shard.file).read_bytes())
    start = tar.index(data)
    tar[start : start + len(data)] = (content * len(data))[: len(data)]
    (root / shard.file).write_bytes(tar)
    return reader.key("train", position)


def epoch_of(config: Config, tokenizer: Tokenizer, **options: int) -> list[Batch]:
    reader = ShardReader(config.data.root)
    loader = build_loader(config, reader, tokenizer, options.get("rank", 0), options.get("ranks", 1),
                          16 // options.get("ranks", 1))  # fmt: skip
    return list(itertools.islice(loader, loader.steps_per_epoch))


def test_a_corrupt_image_is_replaced_counted_and_logged(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(root=str(own_dataset), tail="wrap", max_bad_fraction=0.1)
    whole = epoch_of(config, tokenizer)
    position = int(whole[1].sample[3])
    key = destroy_image(own_dataset, position)
    shard = ShardReader(own_dataset).locate("train", position)[0].file
    damaged = epoch_of(config, tokenizer)
    assert damaged[1].skipped == 1
    assert sum(batch.skipped for batch in damaged) == sum((b.sample == position).sum() for b in whole)
    assert position not in torch.cat([batch.sample for batch in damaged])
    for before, after in zip(whole, damaged, strict=True):
        kept = before.sample != position
        assert torch.equal(before.sample[kept], after.sample[kept])
        assert torch.equal(before.image[kept], after.image[kept])
    assert f"{shard}: sample {key}: its image cannot be decoded" in caplog.text


def test_the_replacement_depends_on_no_layout(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    for position in (4, 11):
        destroy_image(own_dataset, position)
    config = make_config(root=str(own_dataset), tail="wrap", max_bad_fraction=0.2)
    alone = epoch_of(config, tokenizer)
    config.data.workers = 2
    ranks = [epoch_of(config, tokenizer, rank=rank, ranks=2) for rank in range(2)]
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([rank[step].sample for rank in ranks]), batch.sample)
        assert torch.equal(torch.cat([rank[step].image for rank in ranks]), batch.image)
        assert sum(rank[step].skipped for rank in ranks) == batch.skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_samples_stop_the_run(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, workers: int
) -> None:
    config = make_config(root=str(own_dataset), workers=workers, max_bad_fraction=0.05)
    build_loader(config, ShardReader(own_dataset), tokenizer, 0, 1, 16)
    for position in range(0, 40, 4):
        destroy_image(own_dataset, position)
    with pytest.raises(
        DataError, match=r"are corrupt, more than data\.max_bad_fraction=0\.05 allows"
    ) as caught:
        epoch_of(config, tokenizer)
    assert "Traceback" not in str(caught.value)


def test_nothing_readable_stops_the_run(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    config = make_config(root=str(own_dataset), workers=1, max_bad_fraction=1.0)
    build_loader(config, ShardReader(own_dataset), tokenizer, 0, 1, 16)
    for tar in own_dataset.glob("train-*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(DataError, match=r"9 corrupt samples in a row, the last: train-.*\.tar"):
        epoch_of(config, tokenizer)


def test_a_truncated_tar_costs_only_its_samples(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(root=str(own_dataset), tail="wrap", max_bad_fraction=0.5)
    build_loader(config, ShardReader(own_dataset), tokenizer, 0, 1, 16)
    tar = own_dataset / ShardReader(own_dataset).locate("train", 20)[0].file
    tar.write_bytes(tar.read_bytes()[:25000])
    samples = epoch_of(config, tokenizer)
    assert sum(batch.skipped for batch in samples) > 2
    assert f"{tar.name}: truncated before the end of sample" in caplog.text
    assert all(batch.image.flatten(1).any(dim=1).all() for batch in samples)


def test_unreadable_metadata_is_a_corrupt_sample(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ShardReader(own_dataset)
    tar = own_dataset / reader.locate("train", 5)[0].file
    data = bytearray(tar.read_bytes())
    start = data.index(b'{"', data.index(reader.key("train", 5).encode() + b".json"))
    data[start : start + 2] = b"@@"
    tar.write_bytes(data)
    config = make_config(root=str(own_dataset), tail="wrap", max_bad_fraction=0.1)
    samples = epoch_of(config, tokenizer)
    assert 5 not in torch.cat([batch.sample for batch in samples])
    assert "its metadata cannot be read" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        '{"sections": ["MUSTERMANN"]}',
        '{"MUSTERMANN',
        "[" * 150,
        '{"a": "\\ud800", "b": "MUSTERMANN"}',
        '{"labels": {"MUSTERMANN": 1}}',
        '{"a": 1e999}',
        '{"a": 1, "a": "MUSTERMANN"}',
    ],
)
def test_hostile_metadata_is_a_corrupt_sample_and_never_quoted(
    own_dataset: Path,
    make_config: ConfigFactory,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    text: str,
) -> None:
    reader = ShardReader(own_dataset)
    shard, _ = reader.locate("train", 5)
    tar = own_dataset / shard.file
    data = bytearray(tar.read_bytes())
    offset, size = reader._members("train", 5)[2]["json"]
    data[offset : offset + size] = text.encode().ljust(size)
    tar.write_bytes(data)
    config = make_config(root=str(own_dataset), tail="wrap", max_bad_fraction=0.1)
    samples = epoch_of(config, tokenizer)
    assert 5 not in torch.cat([batch.sample for batch in samples])
    key = reader.key("train", 5)
    assert f"{shard.file}: sample {key}: its metadata cannot be read" in caplog.text
    with pytest.raises(DataError, match=f"{shard.file}: sample {key}: its metadata cannot be used") as caught:
        ShardReader(own_dataset).metadata("train", 5)
    assert "MUSTERMANN" not in caplog.text + str(caught.value)


def test_a_shard_that_is_away_is_no_set_of_corrupt_samples(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    config = make_config(root=str(own_dataset), max_bad_fraction=1.0)
    reader = ShardReader(own_dataset)
    loader = build_loader(config, reader, tokenizer, 0, 1, 16)
    shard = own_dataset / reader.locate("train", 0)[0].file
    shard.rename(own_dataset / "away.tar")
    reader.close()
    with pytest.raises(UnavailableError, match=f"{shard.name} cannot be read now"):
        list(itertools.islice(loader, loader.steps_per_epoch))
    (own_dataset / "away.tar").rename(shard)
    assert not any(batch.skipped for batch in itertools.islice(loader, loader.steps_per_epoch))


def test_an_image_larger_than_the_index_says_is_refused(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    import cv2

    bomb = cv2.imencode(".jpg", np.zeros((4000, 4000), np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 1])[1].tobytes()
    config = make_config(root=str(own_dataset))
    loader = build_loader(config, ShardReader(own_dataset), tokenizer, 0, 1, 16)
    dataset = loader._loader.dataset
    dataset.reader.image = lambda split, position: bomb
    with pytest.raises(DataError, match="its image cannot be decoded"):
        dataset.decode(0)


def test_evaluation_leaves_corrupt_samples_out(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    config = make_config(root=str(own_dataset), max_bad_fraction=0.1)
    evaluation_loader(config, ShardReader(own_dataset), tokenizer, "train", 4)
    for position in (0, 1, 2, 3, 9):
        destroy_image(own_dataset, position, content=b"zeros")
    found = list(evaluation_loader(config, ShardReader(own_dataset), tokenizer, "train", 4))
    positions = torch.cat([batch.sample for batch in found]).tolist()
    count = ShardReader(own_dataset).sample_count("train")
    assert positions == [i for i in range(count) if i not in (0, 1, 2, 3, 9)]
    config.data.max_bad_fraction = 0.01
    with pytest.raises(DataError, match="are corrupt"):
        list(evaluation_loader(config, ShardReader(own_dataset), tokenizer, "train", 4))


@pytest.mark.parametrize(
    ("name", "member"),
    [("masks", MASKS_EXTENSION)]
    + [(name, "json") for name in ("boxes", "phrases", "questions", "answers", "report_words")],
)
def test_a_field_that_cannot_be_read_makes_a_corrupt_sample(
    own_dataset: Path,
    make_config: ConfigFactory,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    name: str,
    member: str,
) -> None:
    config = make_config(root=str(own_dataset), tail="wrap", max_bad_fraction=0.1)
    loader = build_loader(config, ShardReader(own_dataset), tokenizer, 0, 1, 16)
    whole = torch.cat([batch.sample for batch in itertools.islice(loader, loader.steps_per_epoch)])
    reader, damaged = ShardReader(own_dataset), [0, 5]
    for position in damaged:
        shard, _ = reader.locate("train", position)
        offset, size = reader._members("train", position)[2][member]
        with (own_dataset / shard.file).open("r+b") as file:
            file.seek(offset)
            file.write(b"@" * size)
    loader = build_loader(config, ShardReader(own_dataset), tokenizer, 0, 1, 16, fields=[name])
    batches = list(itertools.islice(loader, loader.steps_per_epoch))
    assert sum(batch.skipped for batch in batches) == np.isin(whole, damaged).sum() >= 2
    assert all(len(batch.fields[name]) == 16 for batch in batches)
    assert not np.isin(torch.cat([batch.sample for batch in batches]), damaged).any()
    assert f"sample {reader.key('train', 5)}: " in caplog.text
    seen = evaluation_loader(config, ShardReader(own_dataset), tokenizer, "train", 4, fields=[name])
    positions = torch.cat([batch.sample for batch in seen]).tolist()
    assert positions == [i for i in range(reader.sample_count("train")) if i not in damaged]


def test_a_split_whose_field_cannot_be_read_anywhere_says_why(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ShardReader, split: str, i: int) -> dict[str, object]:
        raise DataError(f"sample {i} is broken")

    monkeypatch.setattr(ShardReader, "masks", broken)
    with pytest.raises(DataError, match=r"no sample has a mask \(not all of them can be read: sample \d+ is"):
        build_loader(make_config(), ShardReader(dataset), tokenizer, 0, 1, 16, fields=["masks"])


def test_a_shard_that_cannot_be_fetched_is_no_lack_of_a_field(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: ShardReader, split: str, i: int) -> dict[str, object]:
        raise RemoteError("the server is away")

    monkeypatch.setattr(ShardReader, "masks", away)
    with pytest.raises(RemoteError, match="the server is away"):
        build_loader(make_config(), ShardReader(dataset), tokenizer, 0, 1, 16, fields=["masks"])


def batch_with_faults(rows: int, skipped: int) -> Batch:
    nothing = torch.zeros(0)
    text = Text(nothing, nothing, nothing, nothing)
    faults = ["train-000000.tar: sample 7: broken"] * skipped
    return Batch(nothing, text, nothing, nothing, ["k"] * rows, skipped, faults)


def test_one_rank_stops_at_exactly_the_allowed_number() -> None:
    counter = FaultCounter(0.01, samples=1000, world_size=1, replaced=True)
    for _ in range(10):
        counter.count(batch_with_faults(10, 1))
    with pytest.raises(DataError, match="11 of 110"):
        counter.count(batch_with_faults(10, 1))
    without = FaultCounter(0.01, samples=1000, world_size=1)
    with pytest.raises(DataError, match="11 of 111 samples read"):
        without.count(batch_with_faults(100, 11))
    later = FaultCounter(0.01, samples=1000, world_size=1, replaced=True)
    later.count(batch_with_faults(4000, 40))
    with pytest.raises(DataError):
        later.count(batch_with_faults(1, 1))


def test_many_ranks_neither_stop_by_chance_nor_miss_real_damage() -> None:
    """80 ranks read 10,000 samples of which 0.5 % (fine) or 5 % (too many) are corrupt; 1 % is allowed."""
    generator = np.random.default_rng(0)
    for share, expected in ((0.005, False), (0.05, True)):
        stopped = False
        for corrupt in np.array_split(generator.random(10_000) < share, 80):
            counter = FaultCounter(0.01, samples=10_000, world_size=80, replaced=True)
            try:
                counter.count(batch_with_faults(len(corrupt), int(corrupt.sum())))
            except DataError:
                stopped = True
        assert stopped == expected


def test_warnings_are_few(caplog: pytest.LogCaptureFixture) -> None:
    counter = FaultCounter(1.0, samples=10_000, world_size=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            counter.count(batch_with_faults(10, 10))
    # The first ten, then 16, 32, ..., 512.
    assert len(caplog.records) == 16

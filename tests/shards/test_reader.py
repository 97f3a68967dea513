"""Reading samples back: our reader, stock WebDataset, damaged shards, forked and pickled readers."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.errors import DataError, UnavailableError
from shards.format import Index, fingerprint, hash_bytes
from shards.images import decode_image
from shards.reader import ShardReader, scan_shard
from shards.shard_index import ShardIndex
from shards.sources.phantom import PhantomSource


@pytest.fixture
def copied(phantom_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(phantom_dataset, tmp_path / "copy"))


def read_all(reader: ShardReader) -> list[tuple[str, bytes]]:
    """Key and image of every training sample."""
    return [reader.read("train", i)[:2] for i in range(reader.sample_count("train"))]


def open_files(folder: Path) -> int:
    """Number of files below `folder` this process has open."""
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(file.is_relative_to(folder.resolve()) for file in held)


def test_stock_webdataset_reads_the_same_samples(phantom_dataset: Path) -> None:
    reader = ShardReader(phantom_dataset)
    for split in reader.index.splits:
        urls = [str(phantom_dataset / shard.file) for shard in reader.index.split_shards(split)]
        stock = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert len(stock) == reader.sample_count(split) > 0
        for i, sample in enumerate(stock):
            key, image, metadata = reader.read(split, i)
            assert (sample["__key__"], sample["jpg"]) == (key, image)
            assert json.loads(sample["json"]) == metadata == reader.metadata(split, i)
            stacked = np.asarray(Image.open(io.BytesIO(sample["masks.png"])))
            masks = reader.masks(split, i)
            assert list(masks) == metadata["masks"] == reader.index.label_names
            np.testing.assert_array_equal(stacked, np.concatenate(list(masks.values())) > 0)
            assert reader.image(split, i) == image


def test_samples_are_those_of_the_source(phantom_dataset: Path) -> None:
    reader, source = ShardReader(phantom_dataset), PhantomSource(40, 64, 0)
    keys = [reader.key(split, i) for split in reader.index.splits for i in range(reader.sample_count(split))]
    assert sorted(keys) == [f"{record:08d}-0" for record in range(40)]
    for i in range(0, reader.sample_count("train"), 5):
        key, image, metadata = reader.read("train", i)
        (study,) = source.load(int(key.split("-")[0]))
        assert metadata["sections"] == study.sections
        assert metadata["labels"] == study.labels
        assert np.abs(decode_image(image).astype(int) - study.image).mean() < 4  # JPEG at quality 90


def test_positions_out_of_range_and_unknown_splits(phantom_dataset: Path) -> None:
    reader = ShardReader(phantom_dataset)
    for i in (-1, reader.sample_count("test")):
        with pytest.raises(IndexError):
            reader.read("test", i)
    with pytest.raises(DataError, match="no split"):
        reader.read("dev", 0)


def test_random_access_with_fewer_open_files_than_shards(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.reader._MAX_OPEN_FILES", 2)
    reader = ShardReader(copied)
    expected = read_all(reader)
    order = random.Random(0).choices(range(len(expected)), k=200)
    assert [reader.read("train", i)[:2] for i in order] == [expected[i] for i in order]
    assert open_files(copied) == 2
    reader.close()
    assert open_files(copied) == 0


def test_files_that_a_cache_has_deleted_are_closed(phantom_dataset: Path, tmp_path: Path) -> None:
    def fetch(file: str) -> Path:
        """As a cache that holds one shard."""
        for other in tmp_path.glob("*.tar"):
            other.unlink()
        return Path(shutil.copy(phantom_dataset / file, tmp_path))

    reader = ShardReader(phantom_dataset, fetch=fetch)
    assert read_all(reader) == read_all(ShardReader(phantom_dataset))
    assert len(reader.index.split_shards("train")) > 1
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert len([file for file in held if file.parent == tmp_path and ".tar" in file.name]) == 1


def test_few_files_of_a_cache_are_open(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.reader._MAX_FETCHED_FILES", 1)
    reader = ShardReader(copied, fetch=lambda file: copied / file)
    assert len(read_all(reader)) == reader.sample_count("train")
    assert open_files(copied) == 1


def test_pickled_and_forked_readers_read_on(phantom_dataset: Path) -> None:
    reader = ShardReader(phantom_dataset)
    expected = read_all(reader)
    assert read_all(pickle.loads(pickle.dumps(reader))) == expected
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    # The children share the parent's descriptors, and with them any file position.
    children = [context.Process(target=lambda: results.put(read_all(reader))) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [expected] * 2
    assert read_all(reader) == expected
    for child in children:
        child.join()


def test_truncated_tar_names_shard_and_key(copied: Path) -> None:
    reader = ShardReader(copied)
    shard = reader.index.split_shards("train")[0]
    os.truncate(copied / shard.file, shard.bytes // 2)
    with pytest.raises(DataError, match=rf"{shard.file}: truncated .* sample {reader.key('train', 9)}"):
        reader.read("train", 9)
    assert reader.read("train", 0)[0] == reader.key("train", 0)


def test_missing_shard_and_foreign_index_are_data_errors(copied: Path) -> None:
    first, second = (shard for shard in ShardReader(copied).index.split_shards("train")[:2])
    (copied / first.file).unlink()
    with pytest.raises(DataError, match=f"of {first.file} cannot be read now"):
        ShardReader(copied).read("train", 0)
    shutil.copy(
        copied / ShardReader(copied).index.split_shards("test")[0].index_file, copied / second.index_file
    )
    with pytest.raises(DataError, match=r"differs from its hash in index\.json"):
        ShardReader(copied).read("train", first.samples)
    (copied / second.index_file).unlink()
    with pytest.raises(DataError, match=r"shard index .* cannot be read now"):
        ShardReader(copied).read("train", first.samples)


def test_damaged_metadata_is_an_error_without_its_text(copied: Path) -> None:
    reader = ShardReader(copied)
    tar = copied / reader.index.split_shards("train")[0].file
    tar.write_bytes(tar.read_bytes().replace(b'{"anatomy"', b'["anatomy"'))
    with pytest.raises(DataError) as caught:
        reader.metadata("train", 0)
    where = f"{tar.name}: sample {reader.key('train', 0)}: its metadata cannot be used"
    assert str(caught.value) == f"{where} (no JSON at byte 10)"


def test_remote_root_needs_a_way_to_fetch(phantom_dataset: Path) -> None:
    root = f"pipe:cat {phantom_dataset}"
    with pytest.raises(DataError, match="cache"):
        ShardReader(root)
    reader = ShardReader(root, fetch=lambda file: phantom_dataset / file)
    assert read_all(reader) == read_all(ShardReader(phantom_dataset))


def test_members_far_apart_are_refused_before_memory_is_taken(phantom_dataset: Path, tmp_path: Path) -> None:
    """A sparse file of any size takes no room on disk, and a read from one end to the other all of it."""
    root = Path(shutil.copytree(phantom_dataset, tmp_path / "far"))
    index = Index.load(root)
    shard, far = index.split_shards("train")[0], 1 << 32
    os.truncate(root / shard.file, far + 1024)
    members = {"jpg": (512, 100), "json": (far, 100)}
    data = ShardIndex.from_members([("0-0", members)]).to_bytes()
    (root / shard.index_file).write_bytes(data)
    shards = [replace(shard, samples=1, bytes=far + 1024, index_hash=hash_bytes(data))]
    totals = {"train": replace(index.splits["train"], samples=1)}
    changed = replace(index, shards=shards, splits=totals, fingerprint=fingerprint(shards))
    reader = ShardReader(root, index=changed)
    with pytest.raises(DataError, match="the members of sample 0-0 lie far apart"):
        reader.read("train", 0)


def failing_once(monkeypatch: pytest.MonkeyPatch, error: int, times: int = 1) -> list[int]:
    """Reads fail so many times; the descriptors they were asked for."""
    pread, asked = os.pread, list[int]()

    def read(descriptor: int, size: int, start: int) -> bytes:
        asked.append(descriptor)
        if len(asked) <= times:
            raise OSError(error, os.strerror(error))
        return pread(descriptor, size, start)

    monkeypatch.setattr(os, "pread", read)
    return asked


def test_a_stale_file_is_opened_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(copied)
    expected = reader.image("train", 0)
    asked = failing_once(monkeypatch, errno.ESTALE)
    assert reader.image("train", 0) == expected
    assert len(asked) == 2
    assert open_files(copied) == 1


def test_a_stale_file_keeps_no_other_from_being_opened(
    phantom_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, reader = read_all(ShardReader(phantom_dataset)), ShardReader(phantom_dataset)
    reader.image("train", 0)
    (stale,) = reader._open_files.values()
    fstat = os.fstat

    def fails(descriptor: int) -> os.stat_result:
        if descriptor == stale and descriptor in reader._open_files.values():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", fails)
    assert reader.read("train", len(expected) - 1)[:2] == expected[-1]
    assert list(reader._open_files) == [reader.index.split_shards("train")[-1].file]


@pytest.mark.parametrize(
    ("error", "passes"), [(errno.ESTALE, True), (errno.EACCES, True), (errno.EIO, False)]
)
def test_what_cannot_be_read_now_is_not_called_damaged(
    phantom_dataset: Path, monkeypatch: pytest.MonkeyPatch, error: int, passes: bool
) -> None:
    failing_once(monkeypatch, error, times=2)
    with pytest.raises(DataError, match=r"sample \S+ of train-000000\.tar") as caught:
        ShardReader(phantom_dataset).image("train", 0)
    assert isinstance(caught.value, UnavailableError) == passes
    assert os.strerror(error) in str(caught.value)


def test_a_read_may_bring_fewer_bytes(phantom_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, pread = read_all(ShardReader(phantom_dataset)), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: pread(file, min(size, 1000), start))
    assert read_all(ShardReader(phantom_dataset)) == expected
    index = Index.load(phantom_dataset)
    shard = index.split_shards("train")[0]
    scanned = {key: members for key, members, _ in scan_shard(phantom_dataset, shard, index.label_names)}
    assert {key: scanned[key]["jpg"] for key, _ in expected[: len(scanned)]} == dict(expected[: len(scanned)])


def test_a_read_that_ends_within_the_file_is_no_truncation(
    phantom_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pread", lambda *given: b"")
    with pytest.raises(UnavailableError, match="a read ended within the file"):
        ShardReader(phantom_dataset).image("train", 0)


def test_a_truncated_shard_that_was_repaired_is_opened_again(copied: Path) -> None:
    reader, whole = ShardReader(copied), (copied / "train-000000.tar").read_bytes()
    expected = reader.image("train", 1)
    (copied / "train-000000.tar").write_bytes(whole[:2048])
    with pytest.raises(DataError, match="truncated before the end of sample"):
        reader.image("train", 1)
    (copied / "repaired").write_bytes(whole)
    (copied / "repaired").replace(copied / "train-000000.tar")
    assert reader.image("train", 1) == expected

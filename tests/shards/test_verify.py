"""`verify` finds every kind of damage, and all of it in one run."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.format import Index, fingerprint, hash_file
from shards.images import encode_jpeg
from shards.reader import ShardReader
from shards.sources.phantom import PhantomSource
from shards.sources.table import TableSource
from shards.verify import verify
from shards.writer import Sample, write_shard
from tests.shards.toy_data import Rows, build, write_csv

FIRST = "train-000000.tar"


@pytest.fixture
def dataset(phantom_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(phantom_dataset, tmp_path / "copy"))


def replace_shard(root: Path, change: Callable[[list[Sample]], list[Sample]], file: str = FIRST) -> None:
    """Rewrite a shard with other samples and make the index agree with the new files."""
    import webdataset

    stored = [
        Sample(
            item["__key__"],
            {extension: item[extension] for extension in ("jpg", "json", "masks.png") if extension in item},
        )
        for item in webdataset.WebDataset([str(root / file)], shardshuffle=False)
    ]
    samples = write_shard(root, file, change(stored))
    index = Index.load(root)
    shards = [
        dataclasses.replace(
            shard, samples=samples, hash=hash_file(root / file), index_hash=hash_file(root / shard.index_file)
        )
        if shard.file == file
        else shard
        for shard in index.shards
    ]
    totals = {
        split: dataclasses.replace(total, samples=sum(s.samples for s in shards if s.split == split))
        for split, total in index.splits.items()
    }
    index = dataclasses.replace(index, shards=shards, splits=totals, fingerprint=fingerprint(shards))
    (root / "index.json").write_bytes(index.to_json())


def with_metadata(sample: Sample, **changes: object) -> Sample:
    """The sample with other metadata fields."""
    metadata = json.loads(sample.members["json"]) | changes
    return Sample(sample.key, sample.members | {"json": json.dumps(metadata).encode()})


def test_good_dataset_has_no_problems_with_one_or_two_workers(phantom_dataset: Path) -> None:
    assert verify(phantom_dataset) == []
    assert verify(phantom_dataset, workers=2) == []


def test_rewriting_a_shard_unchanged_is_no_problem(dataset: Path) -> None:
    replace_shard(dataset, lambda samples: samples)
    assert verify(dataset) == []


def test_truncated_tar_and_changed_byte_are_found(dataset: Path) -> None:
    second = dataset / "train-000001.tar"
    os.truncate(dataset / FIRST, (dataset / FIRST).stat().st_size // 2)
    data = bytearray(second.read_bytes())
    data[700] ^= 255  # inside the first image
    second.write_bytes(data)
    problems = verify(dataset)
    assert any(problem.startswith(f"{FIRST}: content differs") for problem in problems)
    assert any(problem.startswith(f"{FIRST}: not a readable tar") for problem in problems)
    assert any(problem.startswith(f"{second.name}: content differs") for problem in problems)


def test_missing_unlisted_and_swapped_files_are_found(dataset: Path) -> None:
    shutil.copy(dataset / FIRST, dataset / "train-000009.tar")
    (dataset / "valid-000000.idx").unlink()
    (dataset / "test-000000.tar").unlink()
    (dataset / "tokenizer.json").write_text("{}")
    shutil.copy(dataset / "train-000001.idx", dataset / "train-000000.idx")
    problems = set(verify(dataset))
    # By its members, or by the end of the tar where that comes before the last of them.
    differs = "train-000000.idx: content differs from its hash in the index"
    assert [problem for problem in problems if problem.startswith("train-000000.idx: ")] != [differs]
    assert problems >= {
        differs,
        "train-000009.tar: is not in the index",
        "valid-000000.idx: missing",
        "test-000000.tar: missing",
        "tokenizer.json: content differs from its hash in the index",
    }


def test_an_image_that_its_file_turns_is_found(dataset: Path) -> None:
    def turn(samples: list[Sample]) -> list[Sample]:
        exif, file = Image.Exif(), io.BytesIO()
        exif[274] = 6
        Image.new("L", (64, 64)).save(file, "JPEG", exif=exif)
        return [Sample(samples[0].key, samples[0].members | {"jpg": file.getvalue()}), *samples[1:]]

    replace_shard(dataset, turn)
    (problem,) = verify(dataset)
    assert "EXIF orientation 6 turns the image, which training reads as it is stored" in problem


def test_bad_samples_are_named_by_key(dataset: Path) -> None:
    def spoil(samples: list[Sample]) -> list[Sample]:
        small = encode_jpeg(np.zeros((8, 8), np.uint8))
        samples[0] = Sample(samples[0].key, samples[0].members | {"jpg": samples[0].members["jpg"][:100]})
        samples[1] = Sample(samples[1].key, samples[1].members | {"jpg": small})
        samples[2] = Sample(samples[2].key, samples[2].members | {"json": b"{"})
        samples[3] = with_metadata(samples[3], labels={"edema": 2}, sections="text")
        samples[4] = with_metadata(samples[4], labels={"phantom limb": 1}, boxes=[{"x": 1}], surprise=1)
        samples[5] = Sample(
            samples[5].key, {name: samples[5].members[name] for name in ("json", "masks.png")}
        )
        samples[6] = Sample(samples[6].key, samples[6].members | {"masks.png": b"no mask"})
        samples[7] = with_metadata(
            samples[7], labels={"edema": 2, "limb": 1}, boxes=[{"x": 1}], patient_id=""
        )
        return samples

    keys: list[str] = []
    replace_shard(dataset, lambda samples: keys.extend(s.key for s in samples) or spoil(samples))
    problems = verify(dataset)
    expected = {
        0: ["broken JPEG"],
        1: ["image is 8 x 8, not 64 x 64"],
        2: ["its metadata cannot be used (no JSON"],
        3: ["field 'sections' is not of type dict"],
        4: ["1 unknown fields"],
        5: ["has 0 images"],
        6: ["masks are no PNG of 12 times 64 x 64"],
        7: ["empty patient_id", "1 labels are not in", "a label is not 1", "an item of 'boxes' is not"],
    }
    for number, phrases in expected.items():
        for phrase in phrases:
            start = f"{FIRST}: sample {keys[number]}: {phrase}"
            assert any(problem.startswith(start) for problem in problems), (start, problems)
    assert len(problems) == sum(len(phrases) for phrases in expected.values())


def test_duplicate_keys_within_and_across_shards_are_found(dataset: Path) -> None:
    other = Index.load(dataset).split_shards("test")[0].file
    taken: list[Sample] = []
    replace_shard(dataset, lambda samples: [*samples, taken.append(samples[1]) or samples[0]])
    replace_shard(dataset, lambda samples: [*samples, taken[0]], other)
    problems = verify(dataset)
    assert (
        sum(
            "is in train-000000.tar too" in problem or "is in test-000000.tar too" in problem
            for problem in problems
        )
        == 2
    )


def test_patient_in_two_splits_is_found_without_naming_the_patient(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: Callable[..., Path]
) -> None:
    for number, row in enumerate(rows):
        row["split"] = "test" if number == 1 else "train"
    source = TableSource(write_csv(tmp_path / "t.csv", rows), image_folder, map_file("split: split\n"))
    summary = build(source, tmp_path / "out")
    assert summary.leaking_patients == 1
    (problem,) = verify(tmp_path / "out")
    assert problem.startswith("a patient is in more than one split (test, train)")
    assert "p0" not in problem


def test_an_image_in_two_splits_is_found_also_under_another_patient(dataset: Path) -> None:
    (first,) = [shard.file for shard in Index.load(dataset).split_shards("test")]
    key, image, _ = ShardReader(dataset).read("train", 3)

    def copy(samples: list[Sample]) -> list[Sample]:
        return [Sample(samples[0].key, samples[0].members | {"jpg": image}), *samples[1:]]

    replace_shard(dataset, copy, first)
    (problem,) = verify(dataset)
    assert problem.startswith("an image is in several splits (test, train): see ")
    assert f"{FIRST}: {key}" in problem


def test_index_that_lies_is_found(dataset: Path) -> None:
    index = Index.load(dataset)
    totals = index.splits | {"train": dataclasses.replace(index.splits["train"], samples=1)}
    shards = [dataclasses.replace(index.shards[0], samples=3), *index.shards[1:]]
    lying = dataclasses.replace(index, splits=totals, shards=shards, fingerprint=f"blake2b:{0:032x}")
    (dataset / "index.json").write_bytes(lying.to_json())
    problems = verify(dataset)
    assert any("holds 10 samples, the index says 3" in problem for problem in problems)
    assert any("split train has 1 samples" in problem for problem in problems)
    assert any("fingerprint" in problem for problem in problems)


def test_phantoms_of_the_fixture_are_enough(phantom_dataset: Path) -> None:
    assert sum(total.samples for total in Index.load(phantom_dataset).splits.values()) == len(
        PhantomSource(40, 64, 0)
    )

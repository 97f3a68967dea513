"""What two datasets share: planted copies are found, everything else is not."""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from launcher.main import app
from shards.build import BuildOptions
from shards.errors import DataError
from shards.fingerprints import COARSE_BITS, FINE_BITS, FINGERPRINT, perceptual_hash
from shards.images import encode_jpeg
from shards.overlap import Common, _similar, overlap, shared_patients
from shards.sample import StoredImage
from shards.sources.base import Json, Source
from shards.sources.phantom.source import PhantomSource
from shards.study import Study
from tests.shards.toy_data import build

PNG = BuildOptions(image=StoredImage(size=64, format="png"), records_per_shard=4)


@dataclass
class Given(Source):
    """Studies that a test made."""

    studies: list[Study]
    name = "given"
    generated = True
    label_names: list[str] = field(default_factory=list)
    arguments: dict[str, Json] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.studies)

    def load(self, i: int) -> list[Study]:
        return [self.studies[i]]

    def split_key(self, i: int) -> str:
        return self.studies[i].patient_id

    def prescribed_split(self, i: int) -> str | None:
        return self.studies[i].split


def picture(seed: int, size: int = 64) -> NDArray[np.uint8]:
    """Smooth as a film, different for each seed."""
    rough = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
    return cv2.resize(rough, (size, size), interpolation=cv2.INTER_CUBIC)


def study(name: str, seed: int, split: str = "train", text: str = "") -> Study:
    return Study(
        f"study {name}", f"patient {name}", picture(seed), split=split, sentences=[text or f"Finding {name}."]
    )


def rows(found: list[Common]) -> dict[tuple[str, str, str], list[tuple[int, int, int]]]:
    return {
        (c.kind, c.split, c.other_split): list(
            zip(c.samples.tolist(), c.others.tolist(), c.partners.tolist(), strict=True)
        )
        for c in found
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A of ten studies; B with A's 2 (all of it), 4's image, 5's recompressed, 6's patient, 7's report."""
    folder = tmp_path_factory.mktemp("overlap")
    ours = [study(str(k), k) for k in range(10)]
    copy = cv2.imdecode(np.frombuffer(encode_jpeg(ours[5].image, 80), np.uint8), cv2.IMREAD_GRAYSCALE)
    theirs = [
        study("x", 100),
        ours[2],
        replace(study("y", 0), image=ours[4].image),
        replace(study("z", 0), image=copy),
        replace(study("v", 103), patient_id=ours[6].patient_id),
        study("w", 104, text="  FINDING  7."),
        study("u", 105, "test", text="Finding 7."),
    ]
    build(Given(ours), folder / "a", PNG)
    build(Given(theirs), folder / "b", PNG)
    return folder / "a", folder / "b"


def test_planted_copies_are_found_and_nothing_else(pair: tuple[Path, Path]) -> None:
    found = overlap(*pair)
    assert rows(found) == {
        ("report", "train", "train"): [(2, 1, 1), (7, 5, 1)],
        ("report", "train", "test"): [(7, 0, 1)],
        ("patient", "train", "train"): [(2, 1, 1), (6, 4, 1)],
        ("study", "train", "train"): [(2, 1, 1)],
        ("similar image", "train", "train"): [(5, 3, 1)],
        ("same image", "train", "train"): [(2, 1, 1), (4, 2, 1)],
    }
    assert shared_patients(found, pair[0]) == ["patient 2", "patient 4", "patient 5", "patient 6"]


def test_a_sample_with_several_partners_is_one_row_with_the_nearest(tmp_path: Path) -> None:
    ours = study("a", 1)
    rough = cv2.imdecode(np.frombuffer(encode_jpeg(ours.image, 70), np.uint8), cv2.IMREAD_GRAYSCALE)
    fine = cv2.imdecode(np.frombuffer(encode_jpeg(ours.image, 95), np.uint8), cv2.IMREAD_GRAYSCALE)
    build(Given([ours]), tmp_path / "a", PNG)
    build(
        Given([replace(study("b", 1), image=rough), study("c", 9), replace(study("d", 1), image=fine)]),
        tmp_path / "b",
        PNG,
    )
    (similar,) = overlap(tmp_path / "a", tmp_path / "b")
    assert (similar.kind, similar.partners.tolist(), similar.other_samples) == ("similar image", [2], 2)
    bits = np.bitwise_count(perceptual_hash(ours.image, 16) ^ perceptual_hash(rough, 16)).sum()
    assert similar.bits[0] <= bits
    assert similar.others.tolist() == [2 if similar.bits[0] < bits else 0]


def test_the_partner_that_is_named_is_the_nearest_one() -> None:
    ours = np.zeros(1, FINGERPRINT)
    theirs = np.zeros(3, FINGERPRINT)
    theirs["fine"][:, 0] = (0b111, 0b1, 0b11)
    found = _similar("train", "test", ours, theirs, np.zeros(0, np.int64), workers=1)
    assert (found.samples.tolist(), found.others.tolist(), found.bits.tolist()) == ([0], [1], [1])
    assert (found.partners.tolist(), found.other_samples) == ([3], 3)


def test_one_dataset_is_compared_between_its_splits_only(tmp_path: Path) -> None:
    studies = [
        study("a", 1),
        study("b", 1, text="Alone."),
        replace(study("c", 1, "valid"), image=picture(7)),
        study("d", 7, "test"),
    ]
    build(Given(studies), tmp_path / "a", PNG)
    assert rows(overlap(tmp_path / "a")) == {("same image", "valid", "test"): [(0, 0, 1)]}


def test_missing_text_and_ids_are_shared_by_nobody(tmp_path: Path) -> None:
    nameless = [replace(study(name, seed), study_id="", sentences=[]) for name, seed in (("a", 1), ("b", 2))]
    build(Given(nameless[:1]), tmp_path / "a", PNG)
    build(Given(nameless[1:]), tmp_path / "b", PNG)
    assert overlap(tmp_path / "a", tmp_path / "b") == []


def test_the_bounds_are_inclusive_and_every_block_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.overlap._ROWS", 3)
    monkeypatch.setattr("shards.overlap._COLUMNS", 4)
    random = np.random.default_rng(0)
    ours = np.zeros(10, FINGERPRINT)
    ours["coarse"] = random.integers(0, 2**63, 10, np.uint64)
    ours["fine"] = random.integers(0, 2**63, (10, 4), np.uint64)
    theirs = ours[::-1].copy()
    theirs["coarse"] ^= np.uint64(2**COARSE_BITS - 1)
    theirs["fine"][:, 0] ^= np.uint64(2**FINE_BITS - 1)
    theirs["coarse"][2] ^= np.uint64(1 << 40)
    theirs["fine"][5, 1] ^= np.uint64(1)
    found = _similar("train", "test", ours, theirs, np.array([1]), workers=1)
    assert found.samples.tolist() == [0, 2, 3, 5, 6, 8, 9]
    assert found.others.tolist() == [9, 7, 6, 4, 3, 1, 0]
    assert set(found.bits.tolist()) == {FINE_BITS}


def test_phantoms_of_other_patients_are_not_alike(tmp_path: Path) -> None:
    for seed in (0, 1):
        build(PhantomSource(studies=40, image_size=64, seed=seed), tmp_path / str(seed), PNG)
    assert {common.kind for common in overlap(tmp_path / "0", tmp_path / "1")} <= {
        "report",
        "patient",
        "study",
    }


def test_the_command_counts_and_writes_keys_but_ids_only_on_request(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out, patients = tmp_path / "shared.csv", tmp_path / "patients.txt"
    command = ["shards", "overlap", *map(str, pair), "--workers", "1"]
    result = CliRunner().invoke(app, [*command, "--out", str(out), "--patients", str(patients)])
    assert result.exit_code == 0, result.output
    assert "2 samples of train" in result.output
    with out.open(newline="") as file:
        lines = list(csv.reader(file))
    assert len(lines) == 1 + 9
    assert ["same image", "train", "00000004-0", "train", "00000002-0", "1", "0"] in lines
    assert "patient 2" not in out.read_text() + result.output
    assert patients.read_text().split("\n")[0] == "patient 2"
    alone = CliRunner().invoke(app, ["shards", "overlap", str(pair[0]), "--workers", "1"])
    assert alone.output.strip() == "nothing is shared"


def test_a_damaged_dataset_is_named_and_never_counts_as_sharing_nothing(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    swapped, torn = (shutil.copytree(pair[0], tmp_path / name) for name in ("swapped", "torn"))
    shutil.copy(swapped / "train-000001.idx", swapped / "train-000000.idx")
    with pytest.raises(DataError, match=r"train-000000\.idx"):
        overlap(swapped, pair[1])
    tar = torn / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600:640] = bytes(40)  # inside the first image
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 00000000-0: "):
        overlap(torn, pair[1])


@pytest.mark.shared
def test_real_films_are_told_apart_and_their_copies_found(shared: Path) -> None:
    files = sorted((shared / "data/labelled/nih1000/images").rglob("*.*"))[:150]
    films = [cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in files]
    copies = [cv2.resize(film, (224, 224), interpolation=cv2.INTER_AREA) for film in films]
    prints = np.zeros((2, len(films)), FINGERPRINT)
    for row, images in zip(prints, (films, copies), strict=True):
        row["coarse"] = [perceptual_hash(image, 8)[0] for image in images]
        row["fine"] = [perceptual_hash(image, 16) for image in images]
    found = _similar("train", "test", *prints, np.zeros(0, np.int64), workers=1)
    assert found.samples.tolist() == found.others.tolist() == list(range(len(films)))
    assert found.partners.max() == 1

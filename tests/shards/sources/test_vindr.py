"""VinDr-CXR: majority labels, boxes by reader and fused, PhysioNet's files and Kaggle's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.vindr import GLOBAL, KAGGLE, LOCAL, VindrOptions, VindrSource, fuse
from shards.study import Box, Study
from tests.fixtures import vindr as fixture
from tests.fixtures.archive import film, write_table
from tests.fixtures.dicom import saved


def positive(study: Study) -> set[str]:
    assert set(study.labels.values()) <= {0, 1}
    return {name for name, value in study.labels.items() if value}


@pytest.fixture
def source(tmp_path: Path) -> VindrSource:
    return VindrSource(VindrOptions(root=fixture.write(tmp_path).root))


def test_findings_of_two_readers_of_three_are_labels(source: VindrSource) -> None:
    films = [source.load(i)[0] for i in (0, 1, 2, 5, 6)]
    assert [film.study_id for film in films] == [fixture.FILMS[i] for i in (0, 1, 2, 5, 6)]
    assert [positive(film) for film in films] == [
        {"Cardiomegaly"},
        {"No finding"},
        {"Pneumonia", "Other diseases"},  # and not "Other lesion", which one reader saw
        {"Pleural effusion", "Other diseases"},
        {"No finding"},
    ]
    assert all(set(film.labels) == {*LOCAL, *GLOBAL} for film in films)
    assert len({*LOCAL, *GLOBAL}) == 28
    assert films[0].extra["votes"] == {"Cardiomegaly": 2, "Nodule/Mass": 1}
    assert films[0].extra["readers"] == ["R10", "R8", "R9"]
    assert "votes" not in films[3].extra
    assert [source.prescribed_split(i) for i in range(7)] == ["train"] * 5 + ["test"] * 2
    assert {film.view for film in films} == {"PA"}


def test_boxes_keep_their_readers(source: VindrSource) -> None:
    assert source.load(0)[0].boxes == [
        Box("Cardiomegaly", 10, 20, 40, 40, reader="R8"),
        Box("Cardiomegaly", 12, 22, 40, 40, reader="R9"),
        Box("Nodule/Mass", 60.5, 70, 9.5, 10, reader="R10"),
    ]
    assert source.load(1)[0].boxes == []
    assert source.load(2)[0].boxes == [Box("Other lesion", 5, 6, 2, 2, reader="R10")]
    assert source.load(5)[0].boxes == [Box("Pleural effusion", 20, 30, 40, 60)]


def test_boxes_move_with_films_whose_pixels_are_not_square(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    path = root / "train" / f"{fixture.FILMS[0]}.dicom"
    dataset = pydicom.dcmread(path)
    dataset.PixelAspectRatio = [2, 1]
    path.write_bytes(saved(dataset))
    study = VindrSource(VindrOptions(root=root)).load(0)[0]
    assert study.image.shape == (192, 80)
    assert study.boxes[0] == Box("Cardiomegaly", 10, 40, 40, 80, reader="R8")


def test_fused_boxes_are_those_of_two_readers(tmp_path: Path) -> None:
    source = VindrSource(VindrOptions(root=fixture.write(tmp_path).root, boxes="fused"))
    assert source.load(0)[0].boxes == [Box("Cardiomegaly", 11, 21, 40, 40)]
    assert source.load(2)[0].boxes == []
    assert source.load(5)[0].boxes == [Box("Pleural effusion", 20, 30, 40, 60)]  # a consensus already


@pytest.mark.parametrize("record", [0, 1, 2, 5, 6])
def test_films_of_every_window_and_polarity_look_the_same(source: VindrSource, record: int) -> None:
    shown = source.load(record)[0].image
    # Percentiles stand in for windows that do not fit, and make the film a little brighter.
    assert np.corrcoef(shown.reshape(-1), film(record).reshape(-1))[0, 1] > 0.98


def test_a_missing_film_and_one_with_two_readers_are_rejected(source: VindrSource) -> None:
    for record, line, reason in ((3, 11, "does not exist"), (4, 14, "2 readers, where every film has 3")):
        with pytest.raises(RejectedRecord, match=reason) as error:
            source.load(record)
        assert error.value.line == line


def test_kaggles_table(tmp_path: Path) -> None:
    source = VindrSource(VindrOptions(root=fixture.write_kaggle(tmp_path)))
    films = [source.load(i)[0] for i in range(len(source))]
    assert [positive(film) for film in films] == [{"Cardiomegaly"}, {"No finding"}]
    assert set(films[0].labels) == set(KAGGLE)
    assert films[0].extra["votes"] == {
        "Cardiomegaly": 2,
        "Nodule/Mass": 1,
        "No finding": 1,
    }  # readers, not boxes
    assert [(box.label, box.reader, box.x) for box in films[0].boxes] == [
        ("Cardiomegaly", "R10", 10), ("Cardiomegaly", "R8", 12),
        ("Nodule/Mass", "R8", 1), ("Nodule/Mass", "R8", 5),
    ]  # fmt: skip
    assert [source.prescribed_split(i) for i in range(2)] == [None, None]
    assert "Kaggle" in films[0].license
    assert {count.name: (count.found, count.published) for count in source.published_counts()} == {
        "all images": (2, 15_000), "rows": (8, 67_914), "boxes": (5, 36_096)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("Cardiomegaly", 4, "R1", 1, 2, 3, 4), "'class_id' and 'class_name'"),
        (("Lesion", 9, "R1", 1, 2, 3, 4), "'class_id' and 'class_name'"),
        (("Cardiomegaly", 3, "", 1, 2, 3, 4), "'rad_id' is empty"),
        (("Cardiomegaly", 3, "R1", 5, 2, 3, 4), "'x_max' and 'y_max' lie before"),
        (("Cardiomegaly", 3, "R1", 1, 2, 3, ""), "'y_max' holds no number"),
        (("Cardiomegaly", 3, "R1", *fixture.NONE), "a finding with a place has no box"),
        (("No finding", 14, "R1", 1, 2, 3, 4), "one without has a box"),
    ],
)
def test_wrong_rows_reject_their_film(tmp_path: Path, row: tuple[object, ...], reason: str) -> None:
    root = fixture.write_kaggle(tmp_path)
    others = [(fixture.FILMS[0], "No finding", 14, reader, *fixture.NONE) for reader in ("R2", "R3")]
    write_table(root / "train.csv", fixture.KAGGLE_HEADER, [(fixture.FILMS[0], *row), *others])
    with pytest.raises(RejectedRecord, match=reason):
        VindrSource(VindrOptions(root=root)).load(0)


def test_labels_are_one_or_zero_and_a_reader_has_one_row(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    table = root / "annotations" / "image_labels_train.csv"
    text = table.read_text()
    for damaged, reason in (
        (text.replace("R8,0", "R8,2", 1), "'Aortic enlargement' holds neither 1 nor 0"),
        (text.replace(",R9,", ",R8,", 1), "a reader has two rows of the film"),
    ):
        table.write_text(damaged)
        with pytest.raises(RejectedRecord, match=reason):
            VindrSource(VindrOptions(root=root)).load(0)
    table.write_text(text.replace("Other diseases", "Other illness"))
    with pytest.raises(DataError, match=r"image_labels_train\.csv has not one column of Other diseases and"):
        VindrSource(VindrOptions(root=root))


def test_boxes_are_fused_by_finding_and_overlap() -> None:
    boxes = [
        Box("A", 0, 0, 10, 10, reader="R1"),
        Box("A", 0, 0, 10, 10, reader="R1"),  # one reader twice is one reader
        Box("A", 100, 0, 10, 10, reader="R1"),
        Box("A", 100, 2, 10, 10, reader="R2"),
        Box("A", 100, 4, 10, 10, reader="R3"),  # overlaps the mean of the two, though hardly the first
        Box("B", 100, 2, 10, 10, reader="R3"),
        Box("A", 107, 2, 10, 10, reader="R3"),
    ]
    assert fuse(boxes) == [Box("A", 100, 2, 10, 10)]
    assert fuse([]) == []

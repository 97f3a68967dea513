"""RSNA Pneumonia: labels, boxes, patients with and without the mapping, the published lists of others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError, UsageError
from shards.sources.base import RejectedRecord
from shards.sources.rsna import RsnaOptions, RsnaSource
from shards.study import Box
from tests.fixtures import rsna as fixture
from tests.fixtures.archive import film, write_table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fixture.write(tmp_path / "rsna").root


def test_a_film_is_one_record_however_many_rows_it_has(root: Path) -> None:
    source = RsnaSource(RsnaOptions(root=root))
    films = [source.load(i)[0] for i in range(5)]
    assert len(source) == 7
    assert [film.study_id for film in films] == fixture.FILMS[:5]
    assert [film.labels for film in films] == [
        {"Pneumonia": 1, "Normal": 0},
        {"Pneumonia": 0, "Normal": 1},
        {"Pneumonia": 0, "Normal": 0},
        {"Pneumonia": 1, "Normal": 0},
        {"Pneumonia": 0, "Normal": 1},
    ]
    assert [film.extra["class"] for film in films] == fixture.CLASSES[:5]
    assert [film.view for film in films] == ["PA", "AP", "PA", "AP", "PA"]
    assert films[0].boxes == [Box("Pneumonia", 250, 140, 200, 360), Box("Pneumonia", 600, 152.5, 210, 400)]
    assert [film.boxes for film in films[1:3]] == [[], []]
    assert films[3].boxes == [Box("Pneumonia", 1, 2, 10, 20)]  # of 1,024 pixels, in a copy of 128
    assert np.abs(films[0].image.astype(int) - film(0, 1024, 1024)).mean() < 1
    assert {count.name: count.found for count in source.published_counts()} == {
        "all images": 7, "label rows": 8, "boxes": 3,
        "Lung Opacity": 2, "Normal": 3, "No Lung Opacity / Not Normal": 2,
    }  # fmt: skip


def test_a_missing_film_and_one_of_another_are_rejected(root: Path) -> None:
    source = RsnaSource(RsnaOptions(root=root))
    for record, reason in ((5, "by its PatientID"), (6, "does not exist")):
        with pytest.raises(RejectedRecord, match=reason) as error:
            source.load(record)
        assert error.value.line == record + 3  # the first film has two rows


def test_without_the_mapping_it_is_said_that_patients_are_unknown(root: Path, tmp_path: Path) -> None:
    source = RsnaSource(RsnaOptions(root=root))
    assert any("a patient may be in two splits" in remark for remark in source.remarks())
    assert [source.split_key(i) for i in range(2)] == fixture.FILMS[:2]
    fixture.write_mapping(tmp_path / "mapping.json")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "mapping.json").write_text("[]")  # the file that is named is meant
    (tmp_path / "nih.txt").write_text("00090002_001.png\n00090003\n90003\n")
    mapped = RsnaSource(
        RsnaOptions(root=root, mapping=tmp_path / "mapping.json", exclude=[tmp_path / "nih.txt"])
    )
    assert [mapped.split_key(i) for i in range(3)] == ["90001", "90001", "90004"]
    first = mapped.load(0)[0]
    assert (first.patient_id, first.extra["nih_image"]) == ("90001", "00090001_000.png")
    assert not any("two splits" in remark for remark in mapped.remarks())


def test_the_mapping_in_the_root_is_taken_and_must_name_every_film(root: Path) -> None:
    path = root / fixture.MAPPING
    fixture.write_mapping(path)
    assert RsnaSource(RsnaOptions(root=root)).split_key(3) == "90001"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    with pytest.raises(RejectedRecord, match="does not name the film"):
        RsnaSource(RsnaOptions(root=root)).load(0)
    for text, reason in (
        ('{"a": 1}', "not a list of objects"),
        ("[1", "get the file again"),
        ("[3]", "not a"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=reason) as error:
            RsnaSource(RsnaOptions(root=root))
        assert fixture.MAPPING in str(error.value)


@pytest.mark.parametrize(
    ("labels", "classes", "reason"),
    [
        ([("a", 1, 2, 3, 4, 0)], [("a", "Normal")], "a row with Target 1 has a box"),
        ([("a", "", "", "", "", 1)], [("a", "Lung Opacity")], "a row with Target 1 has a box"),
        ([("a", 1, 2, 3, "", 1)], [("a", "Lung Opacity")], "a row with Target 1 has a box"),
        ([("a", 1, 2, 3, 4, 1)], [("a", "Normal")], "contradict each other"),
        ([("a", "", "", "", "", 0)], [("a", "Lung Opacity")], "contradict each other"),
        ([("a", "", "", "", "", 0)], [("a", "Normal"), ("a", "Lung Opacity")], "or several"),
        ([("a", "", "", "", "", 0)], [("b", "Normal")], "gives it no class"),
        ([("a", "", "", "", "", 0)], [("a", "normal")], "an unknown one"),
    ],
)
def test_rows_that_contradict_each_other_are_rejected(
    tmp_path: Path, labels: list[tuple[object, ...]], classes: list[tuple[str, str]], reason: str
) -> None:
    write_table(tmp_path / "stage_2_train_labels.csv", fixture.HEADER, labels)
    write_table(tmp_path / "stage_2_detailed_class_info.csv", fixture.CLASS_HEADER, classes)
    with pytest.raises(RejectedRecord, match=reason):
        RsnaSource(RsnaOptions(root=tmp_path)).load(0)


def test_lists_of_lovt_and_medklip_give_the_split(root: Path, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "valid", "test")):
        rows = [(fixture.FILMS[number], "1;2;3;4|5;6;7;8" if number == 0 else "", 1 - number // 2)]
        write_table(tmp_path / f"{split}.csv", "ID,boxes,classes", rows)
    lists = [f"{split}={tmp_path / split}.csv" for split in ("train", "valid", "test")]
    source = RsnaSource(RsnaOptions(root=root, split_list=lists))
    assert [(source.prescribed_split(i), source.load(i)[0].study_id) for i in range(len(source))] == [
        ("train", fixture.FILMS[0]), ("valid", fixture.FILMS[1]), ("test", fixture.FILMS[2])
    ]  # fmt: skip


def test_a_share_of_train_needs_a_train(root: Path) -> None:
    with pytest.raises(UsageError, match=r"--valid-share is of an archive's own train.*by --split"):
        RsnaSource(RsnaOptions(root=root, valid_share=0.5))


def test_the_window_changes_the_pixels(root: Path) -> None:
    plain, equal = (
        RsnaSource(RsnaOptions(root=root, window=window)).load(1)[0].image for window in ("auto", "equalize")
    )
    assert (plain != equal).any()

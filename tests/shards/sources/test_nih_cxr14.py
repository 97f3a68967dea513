"""NIH ChestX-ray14: labels, boxes, split and identity, on synthetic films and on real ones."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from launcher.main import app
from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.nih_cxr14 import NihOptions, NihSource
from shards.study import Box
from tests.fixtures import nih_cxr14 as fixture
from tests.fixtures.archive import film, write_table
from tests.shards.toy_data import folder_bytes


@pytest.fixture
def source(tmp_path: Path) -> NihSource:
    return NihSource(NihOptions(root=fixture.write(tmp_path).root))


def test_labels_views_and_people(source: NihSource) -> None:
    films = [source.load(i)[0] for i in range(5)]
    assert [{name for name, value in film.labels.items() if value} for film in films] == [
        {"Effusion", "Pleural_Thickening"},
        {"No Finding"},
        {"Infiltration"},
        {"Mass", "Nodule"},
        {"Hernia"},
    ]
    assert all(film.labels.keys() == set(source.label_names) for film in films)
    assert [film.view for film in films] == ["PA", "AP", "PA", "AP", "PA"]
    assert [film.patient_id for film in films] == ["90001", "90001", "90002", "90003", "90004"]
    assert [film.extra["age"] for film in films] == [57, 58, None, 31, 80]
    assert [source.prescribed_split(i) for i in range(6)] == ["train"] * 3 + ["test"] * 2 + ["train"]


def test_boxes_are_of_the_1024_film_and_move_with_a_smaller_copy(source: NihSource) -> None:
    assert source.load(2)[0].boxes == [Box("Infiltration", 39.0625, 50.03125, 15.0, 12.34375)]
    assert [(box.label, box.x, box.height) for box in source.load(3)[0].boxes] == [
        ("Mass", 1.25, 5.0),
        ("Nodule", 62.5, 7.5625),
    ]
    assert source.load(0)[0].boxes == []


def test_the_alpha_of_an_rgba_film_is_dropped(source: NihSource) -> None:
    assert (source.load(4)[0].image == film(4, fixture.SIDE, fixture.SIDE)).all()


def test_a_missing_film_and_a_name_of_another_patient_are_rejected_with_their_line(source: NihSource) -> None:
    for record, line, reason in ((5, 7, "does not exist"), (6, 8, "'Image Index' and 'Patient ID'")):
        with pytest.raises(RejectedRecord, match=reason) as error:
            source.load(record)
        assert error.value.line == line


def test_a_film_in_no_list_and_an_unknown_label_are_rejected(tmp_path: Path) -> None:
    archive = fixture.write(tmp_path)
    (tmp_path / "test_list.txt").write_text("00090003_000.png")
    table = tmp_path / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("Mass|Nodule", "Mass|Knot"))
    source = NihSource(NihOptions(root=archive.root))
    for record, reason in ((4, "neither train_val_list.txt nor test_list.txt"), (3, "'Finding Labels'")):
        with pytest.raises(RejectedRecord, match=reason):
            source.load(record)


def test_boxes_of_unknown_films_are_counted(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    row = ("00099999_000.png", "Mass", 1, 2, 3, 4, "", "", "")
    write_table(root / "BBox_List_2017.csv", fixture.BOX_HEADER, [row])
    source = NihSource(NihOptions(root=root))
    assert "BBox_List_2017.csv: 1 rows are about no record of the archive" in source.remarks()


def test_the_first_release_with_its_trailing_comma_is_read(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    table = root / "Data_Entry_2017_v2020.csv"
    lines = [line + "," for line in table.read_text().replace(",57,", ",057Y,").splitlines()]
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines))
    table.unlink()
    assert NihSource(NihOptions(root=root)).load(0)[0].extra["age"] == 57


def test_a_share_of_the_train_patients_can_be_valid(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    films = [
        (f"{90100 + n:08d}_000.png", "No Finding", 0, 90100 + n, 1, "M", "PA", 1, 1, 1, 1) for n in range(200)
    ]
    write_table(root / "Data_Entry_2017_v2020.csv", fixture.HEADER, films)
    (root / "train_val_list.txt").write_text("\n".join(film[0] for film in films[:150]))
    (root / "test_list.txt").write_text("\n".join(film[0] for film in films[150:]))
    write_table(root / "BBox_List_2017.csv", fixture.BOX_HEADER, [])
    source = NihSource(NihOptions(root=root, valid_share=0.2))
    splits = [source.prescribed_split(i) for i in range(200)]
    assert set(splits[150:]) == {"test"}
    assert 15 <= splits[:150].count("valid") <= 45
    assert splits[:150].count("train") + splits[:150].count("valid") == 150
    counts = {count.name: count.found for count in source.published_counts()}
    assert counts["train images"] == 150


@pytest.mark.shared
def test_real_films_with_their_boxes(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "labelled" / "nih1000"
    with (folder / "labels.csv").open(newline="") as file:
        labels = {row["id"]: row for row in csv.DictReader(file)}
    with (folder / "boxes.csv").open(newline="") as file:
        boxes = [row for row in csv.DictReader(file) if row["source"].startswith("NIH")]
    chosen = [labels[name] for name in dict.fromkeys(box["id"] for box in boxes)]
    films = [
        (f"{row['id']}.png", row["finding_labels"], row["follow_up"], row["patient_id"].removeprefix("nih-"),
         row["age"], row["sex"], row["view"], 1, 1, 1, 1)
        for row in chosen
    ]  # fmt: skip
    write_table(tmp_path / "Data_Entry_2017_v2020.csv", fixture.HEADER, films)
    (tmp_path / "train_val_list.txt").write_text("none.png")
    (tmp_path / "test_list.txt").write_text("\n".join(film[0] for film in films))
    rows = [
        (f"{box['id']}.png", box["label"], *(2 * float(box[side]) for side in "xywh"), "", "", "")
        for box in boxes
    ]
    write_table(tmp_path / "BBox_List_2017.csv", fixture.BOX_HEADER, rows)
    (tmp_path / "images").mkdir()
    for row in chosen:
        Image.open(folder / row["image"]).save(tmp_path / "images" / f"{row['id']}.png", compress_level=1)
    source = NihSource(NihOptions(root=tmp_path))
    found = [study for i in range(len(source)) for study in source.load(i)]
    assert len(found) == len(chosen) > 30
    assert sum(len(study.boxes) for study in found) == len(boxes) == 49
    for study, row in zip(found, chosen, strict=True):
        assert {name for name, value in study.labels.items() if value} == set(
            row["finding_labels"].split("|")
        )
        mine = [box for box in boxes if box["id"] == row["id"]]
        for box, real in zip(study.boxes, mine, strict=True):
            sides = [float(real[side]) for side in "xywh"]
            assert [box.x, box.y, box.width, box.height] == pytest.approx(sides)
            assert study.labels[box.label] == 1  # a box is of a finding that the film has


def test_a_box_of_an_unnamed_row_stops_the_build(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    write_table(root / "BBox_List_2017.csv", fixture.BOX_HEADER, [("", "Mass", 1, 2, 3, 4, "", "", "")])
    with pytest.raises(
        DataError, match=r"BBox_List_2017\.csv, line 2: column 'Image Index' is empty; get the"
    ):
        NihSource(NihOptions(root=root))


def test_the_command_gives_the_same_bytes_in_one_process_and_in_two(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "nih").root
    for workers in ("1", "2"):
        words = [
            "--root",
            str(root),
            "--out",
            str(tmp_path / workers),
            "--image-size",
            "64",
            "--workers",
            workers,
        ]
        result = CliRunner().invoke(app, ["shards", "build", "nih-cxr14", *words, "--max-rejected", "1"])
        assert result.exit_code == 0, result.output
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")

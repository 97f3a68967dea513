"""MS-CXR: phrases with boxes, one record an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.archives import mimic
from shards.archives.records import Record
from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.ms_cxr import MsCxrOptions, MsCxrSource
from shards.study import Box, Phrase
from tests.fixtures import mimic_cxr
from tests.fixtures import ms_cxr as fixture


def test_phrases_boxes_views_and_splits(tmp_path: Path) -> None:
    archive = fixture.write(tmp_path)
    source = MsCxrSource(MsCxrOptions(root=archive.root, **archive.options))
    first, second = source.load(0)[0], source.load(1)[0]
    assert [(phrase.text, len(phrase.boxes)) for phrase in first.phrases] == [
        ("right apical pneumothorax", 1),
        ("bilateral effusions", 2),
    ]
    assert first.boxes == [
        Box("Pneumothorax", 20.0, 30.0, 40.0, 50.0),
        Box("Pleural Effusion", 5.0, 60.0, 20.0, 30.0),
        Box("Pleural Effusion", 50.0, 60.0, 20.0, 30.0),
    ]
    assert {name for name, value in first.labels.items() if value} == {"Pneumothorax", "Pleural Effusion"}
    assert first.labels["Edema"] is None
    assert (first.patient_id, first.study_id, first.view, first.split) == (
        "11000004",
        "50913680",
        "AP",
        "valid",
    )
    assert (second.patient_id, second.study_id, second.split) == ("10000003", "50000003", "test")
    assert first.image.shape == (96, 80)
    with pytest.raises(RejectedRecord, match="does not exist"):
        source.load(2)
    assert {count.name: count.found for count in source.published_counts()} == {"phrases": 4}


def test_version_0_1_has_no_splits_and_is_for_testing(tmp_path: Path) -> None:
    archive = fixture.write(tmp_path)
    archive.tables[0].unlink()
    mimic_cxr.write_ms_cxr(archive.root, "1.0.0")
    source = MsCxrSource(MsCxrOptions(root=archive.root, **archive.options))
    assert [source.prescribed_split(i) for i in range(len(source))] == ["test", "test"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",40,60,", ",40,x,", "column 'y' holds no number"),
        (",160,192,", ",0,192,", "'image_width' or 'image_height' is not positive"),
        ("Pneumothorax,", "Fracture,", "none of the eight categories"),
        ("files/p11/p11000004/s50913680/", "files/", "is no path like files/"),
    ],
)
def test_a_wrong_cell_rejects_its_image_with_the_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    archive = fixture.write(tmp_path)
    table = archive.tables[0]
    lines = table.read_text().splitlines(keepends=True)
    assert old in lines[1]
    lines[1] = lines[1].replace(old, new)
    table.write_text("".join(lines))
    source = MsCxrSource(MsCxrOptions(root=archive.root, **archive.options))
    with pytest.raises(RejectedRecord, match=message) as error:
        source.load(0)
    assert error.value.line == 2
    assert table.name in error.value.reason


def test_the_images_folder_must_be_there(tmp_path: Path) -> None:
    archive = fixture.write(tmp_path)
    with pytest.raises(DataError, match=r"get the archive from https.*mimic-cxr-jpg"):
        MsCxrSource(MsCxrOptions(root=archive.root, images=tmp_path / "nowhere"))


def test_boxes_move_by_height_and_width_apart() -> None:
    cells = {"category_name": "Edema", "label_text": "edema", "image_height": "100", "image_width": "50"}
    record = Record("table.csv", 2, cells | {"x": "10", "y": "20", "w": "5", "h": "40"})
    assert mimic.phrases([record], (50, 100)) == [Phrase("edema", (Box("Edema", 20, 10, 10, 20),))]

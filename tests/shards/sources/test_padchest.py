"""PadChest: labels of whole names, 16 bits, polarity, views, Spanish reports."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards.entities.extractor import check_language
from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.padchest import PadChestOptions, PadChestSource
from tests.fixtures import padchest as fixture
from tests.fixtures.archive import film


@pytest.fixture
def source(tmp_path: Path) -> PadChestSource:
    return PadChestSource(PadChestOptions(root=fixture.write(tmp_path).root))


def test_labels_are_whole_names_and_unknown_where_the_list_is_incomplete(source: PadChestSource) -> None:
    names = ["cardiomegaly", "mass", "mediastinal mass", "pleural effusion"]
    assert source.label_names == names
    labels = [[source.load(i)[0].labels[name] for name in names] for i in range(6)]
    assert labels == [
        [0, 0, 0, 0],  # normal
        [1, 0, 0, 1],
        [0, 0, 1, 0],  # "mass" is another finding
        [0, 1, 0, 0],
        [None] * 4,  # "unchanged" alone says nothing of what there is
        [None, 1, None, None],  # excluded
    ]


def test_reports_views_people_and_places(source: PadChestSource) -> None:
    studies = [source.load(i)[0] for i in range(6)]
    assert [study.view for study in studies] == ["PA", "LATERAL", "AP", "AP", "PA", "COSTAL"]
    assert studies[1].sections == {"findings": "cardiomegalia . derrame pleural izquierdo ."}
    assert studies[3].sections == {}
    assert [study.patient_id for study in studies[:3]] == ["P900001", "P900001", "P900002"]
    assert [study.study_id for study in studies[:2]] == ["90000", "90001"]
    assert [study.extra["age"] for study in studies] == [65, 65, 84, None, 16, 35]
    assert studies[1].extra["localizations"] == ["basal", "left"]
    assert studies[2].extra["projection"] == "AP_horizontal"
    assert [study.extra["labelled_by"] for study in studies[:3]] == ["physician", "physician", "model"]
    assert [source.lists(i) for i in range(3)] == [["physician"], ["physician"], []]
    assert {source.prescribed_split(i) for i in range(10)} == {None}


def test_16_bits_are_scaled_and_negatives_inverted(source: PadChestSource, tmp_path: Path) -> None:
    for i in range(6):
        difference = source.load(i)[0].image.astype(int) - film(i)
        assert np.abs(difference).max() <= 2
    assert source.take_notes() == {"MONOCHROME1 films were inverted": 1}
    assert source.take_notes() == {}
    kept = PadChestSource(PadChestOptions(root=tmp_path, keep_polarity=True)).load(2)[0].image
    assert np.abs(255 - kept.astype(int) - film(2)).max() <= 2


def test_a_film_that_was_positive_already_is_told(source: PadChestSource) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bright_middle = np.zeros((40, 40), np.uint8)
        bright_middle[10:30, 10:30] = 200
        patch.setattr(source, "image", lambda *paths: bright_middle)
        source.load(2)
    notes = Counter(source.take_notes())
    assert sum(count for note, count in notes.items() if "brighter at their edges" in note) == 1


def test_rows_that_cannot_be_used(source: PadChestSource) -> None:
    for record, reason in (
        (6, "'Labels' is empty"),
        (fixture.TRUNCATED, "broken image"),
        (fixture.ZEROED, "broken image"),
        (9, "'Projection' names no view"),
    ):
        with pytest.raises(RejectedRecord, match=reason) as error:
            source.load(record)
        assert error.value.line == record + 2


@pytest.mark.parametrize("cell", ["mass", "['mass'", "[nan]", "__import__('os')", "[" * 20_000, "{'mass'}"])
def test_labels_that_are_no_list_are_rejected_and_never_run(cell: str, tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    table = root / fixture.TABLE
    table.write_text(table.read_text().replace("\"['cardiomegaly', ' pleural effusion']\"", f'"{cell}"'))
    source = PadChestSource(PadChestOptions(root=root))
    with pytest.raises(RejectedRecord, match="column 'Labels' is no list of names"):
        source.load(1)


def test_more_names_than_findings_stop_the_build(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    table = root / fixture.TABLE
    many = str([f"name {number}" for number in range(600)])
    table.write_text(
        table.read_text()
        .replace("['normal']", many.replace("name", "other"), 1)
        .replace("['unchanged']", f'"{many}"')
        .replace(many.replace("name", "other"), f'"{many.replace("name", "other")}"')
    )
    with pytest.raises(DataError, match=r"line 6: column 'Labels' names more than 1,000 findings"):
        PadChestSource(PadChestOptions(root=root))


def test_a_folder_that_its_zip_leaves_out_is_not_needed(source: PadChestSource, tmp_path: Path) -> None:
    expected = source.load(1)[0].image
    (tmp_path / "1" / fixture.image_id(1)).rename(tmp_path / fixture.image_id(1))
    assert (source.load(1)[0].image == expected).all()


def test_english_rules_refuse_the_spanish_reports(source: PadChestSource) -> None:
    with pytest.raises(DataError, match="language: es"):
        check_language(source.arguments)

"""SLAKE: questions in two languages, boxes of organs and findings, the split by image."""

import json
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.slake import SlakeOptions, SlakeSource
from shards.study import Box, Question
from tests.fixtures import slake as fixture


@pytest.fixture
def source(tmp_path: Path) -> SlakeSource:
    return SlakeSource(SlakeOptions(root=fixture.write(tmp_path).root))


def test_questions_of_an_image_in_both_languages(source: SlakeSource) -> None:
    studies = {study.study_id: study for i in (1, 2, 3, 4, 5) for study in source.load(i)}
    assert list(studies) == ["xmlab1", "xmlab2", "xmlab5", "xmlab3", "xmlab4"]
    assert studies["xmlab1"].questions == [
        Question("Is the heart enlarged?", "Yes", "closed", "abnormality", "en"),
        Question("心脏大吗?", "是的", "closed", "abnormality", "zh"),
        Question("How many lungs are there?", "2", "open", "quantity", "en"),
    ]
    assert studies["xmlab2"].questions == [Question("Which organ is shown?", "Liver", "open", "organ", "en")]
    assert [study.split for study in studies.values()] == ["train", "train", "train", "valid", "test"]
    assert studies["xmlab2"].extra["modality"] == "CT"


def test_boxes_of_findings_and_of_organs(source: SlakeSource) -> None:
    one, two, five, three, four = (source.load(i)[0] for i in (1, 2, 3, 4, 5))
    assert one.boxes == [Box("Cardiomegaly", 20, 40, 30, 20)]
    assert one.anatomy == [Box("Left Lung", 10, 12, 30, 40.5)]
    assert two.boxes == [Box("Brain Enhancing Tumor", 5, 6, 7, 8)]
    assert two.anatomy == [Box("Liver", 1, 2, 3, 4)]
    assert five.boxes == five.anatomy == three.boxes == three.anatomy == []
    assert four.anatomy == [Box("Heart", 70, 90, 20, 20)]  # beyond the image: cut off when it is stored


def test_images_without_a_file_of_boxes_are_told(source: SlakeSource, tmp_path: Path) -> None:
    source.load(1)
    assert source.take_notes() == {}
    (tmp_path / "Slake1.0" / "imgs" / "xmlab1" / "detection.json").unlink()
    source.load(1)
    assert source.take_notes() == {"images have no detection.json, and so no boxes": 1}


def test_all_questions_are_counted_whatever_is_asked_for(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    source = SlakeSource(SlakeOptions(root=root, language=["en"], modality=["X-Ray"]))
    usable = [source.split_key(i) for i in range(len(source)) if not source.split_key(i).startswith("row")]
    assert usable == ["xmlab1", "xmlab3", "xmlab4", "xmlab6"]
    assert [question.language for question in source.load(1)[0].questions] == ["en", "en"]
    assert "2 images were left out (--language, --modality)" in source.remarks()
    counts = {count.name: (count.published, count.found) for count in source.published_counts()}
    assert counts == {
        "images with questions": (642, 6),
        "questions": (14_028, 8),
        "train questions in English": (4_919, 3),
        "valid questions in English": (1_053, 1),
        "test questions in English": (1_061, 2),
    }
    with pytest.raises(DataError, match="--language de"):
        SlakeSource(SlakeOptions(root=root, language=["de"]))


def test_a_third_language_and_a_missing_image_are_rejected(source: SlakeSource) -> None:
    for record, line, reason in ((0, 5, r"train\.json: 'q_lang' is neither"), (6, 2, "does not exist")):
        with pytest.raises(RejectedRecord, match=reason) as error:
            source.load(record)
        assert error.value.line == line


def test_an_image_in_two_files_is_rejected(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    path = root / "Slake1.0" / "test.json"
    items = json.loads(path.read_text())
    items[0]["img_name"] = "xmlab1/source.jpg"
    path.write_text(json.dumps(items))
    source = SlakeSource(SlakeOptions(root=root))
    with pytest.raises(RejectedRecord, match="stand in several of the files"):
        source.load(1)
    assert source.load(2)[0].study_id == "xmlab2"


@pytest.mark.parametrize(
    "text",
    ["{", "{}x", '[{"Heart": [1, 2, 3]}]', '[{"Heart": [1, 2, 3, "a"]}]', '[{"Heart": [1, 2, -3, 4]}]', "[1]",
     '[{"Heart": 1}]', '[{"Heart": [1, 2, 3, true]}]', "3"],
)  # fmt: skip
def test_boxes_of_another_form_reject_the_image(text: str, tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    (root / "Slake1.0" / "imgs" / "xmlab1" / "detection.json").write_text(text)
    with pytest.raises(RejectedRecord, match=r"detection\.json of the image is no list"):
        SlakeSource(SlakeOptions(root=root)).load(1)


def test_lists_may_name_the_folder_or_the_file(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    (tmp_path / "out.txt").write_text("xmlab1\nimgs/xmlab2/source.jpg\nxmlab3/source.jpg\n")
    source = SlakeSource(SlakeOptions(root=root, exclude=[tmp_path / "out.txt"]))
    assert "3 records left out: --exclude" in source.remarks()

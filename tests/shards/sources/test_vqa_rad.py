"""VQA-RAD: questions and answers of both forms, and test images that train never sees."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.vqa_rad import VqaRadOptions, VqaRadSource
from shards.study import Question, Study
from tests.fixtures import vqa_rad as fixture
from tests.fixtures.archive import film


def studies(source: VqaRadSource) -> list[Study]:
    """All images that can be read."""
    found = []
    for i in range(len(source)):
        try:
            found += source.load(i)
        except RejectedRecord:
            continue
    return found


def test_a_test_case_is_seen_in_test_only(tmp_path: Path) -> None:
    source = VqaRadSource(VqaRadOptions(root=fixture.write(tmp_path).root))
    one, three, four = studies(source)
    assert [study.study_id for study in (one, three, four)] == [fixture.name(n) for n in (1, 3, 4)]
    assert [study.split for study in (one, three, four)] == ["test", "train", "test"]
    assert one.patient_id == "https://example.org/case?id=a"
    assert one.questions == [Question("Where is the effusion?", "left base", "open", "pos")]
    assert three.questions == [
        Question("Is this a CT?", "no", "closed", "modality"),
        Question("What is bright, and where?", "the ventricles", "open", "attrib, pos"),
    ]
    assert np.abs(four.image.astype(int) - film(4)).mean() < 4  # JPEG
    assert three.extra["organ"] == "HEAD"
    # Image 2 is of the case of image 1, which is a test case.
    assert "3 train questions about test images were left out (--official-split)" in source.remarks()
    counts = {count.name: (count.published, count.found) for count in source.published_counts()}
    assert counts == {"questions": (2_248, 8), "test questions": (451, 2)}


def test_mevf_names_no_case_so_an_image_is_one(tmp_path: Path) -> None:
    root = fixture.write_mevf(tmp_path).root
    (root / "valset.json").write_text("[]")
    source = VqaRadSource(VqaRadOptions(root=root))
    assert "valset.json is no part of the set and was not read" in source.remarks()
    found = {study.study_id: study for study in studies(source)}
    assert [(fixture.name(n), found[fixture.name(n)].split) for n in (1, 2, 3, 4)] == [
        (fixture.name(1), "test"),
        (fixture.name(2), "train"),
        (fixture.name(3), "train"),
        (fixture.name(4), "test"),
    ]
    assert found[fixture.name(2)].questions == [Question("How many nodules are there?", "3", "open", "count")]
    counts = {count.name: (count.published, count.found) for count in source.published_counts()}
    assert counts == {
        "train questions": (3_064, 6),
        "test questions": (451, 2),
        "images with test questions": (203, 2),
    }


def test_the_official_split_has_test_images_in_train_too(tmp_path: Path) -> None:
    root = fixture.write_mevf(tmp_path).root
    source = VqaRadSource(VqaRadOptions(root=root, official_split=True))
    of_one = [study for study in studies(source) if study.study_id == fixture.name(1)]
    assert [study.split for study in of_one] == ["train", "test"]
    assert of_one[0].questions == [
        Question("Is there an effusion?", "Yes", "closed", "pres"),
        Question("Do you see an effusion?", "Yes", "closed", "pres"),
    ]
    (tmp_path / "out.txt").write_text(fixture.name(1))
    rest = VqaRadSource(VqaRadOptions(root=root, official_split=True, exclude=[tmp_path / "out.txt"]))
    assert len(source) - len(rest) == 2  # a list names the image, whatever its split


def test_one_organ_only(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    source = VqaRadSource(VqaRadOptions(root=root, organ=["CHEST"]))
    assert [study.study_id for study in studies(source)] == [fixture.name(1)]
    assert "2 images of other organs were left out (--organ)" in source.remarks()
    assert {count.found for count in source.published_counts()} == {8, 2}  # counted before
    with pytest.raises(DataError, match="--organ: the archive has no image of chest"):
        VqaRadSource(VqaRadOptions(root=root, organ=["chest"]))


def test_questions_that_cannot_be_used_and_missing_images(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    path = root / "VQA_RAD Dataset Public.json"
    items = json.loads(path.read_text())
    items[4]["answer_type"] = "MAYBE"
    del items[5]["question"]
    path.write_text(json.dumps([*items, "none"]))
    source = VqaRadSource(VqaRadOptions(root=root))
    reasons = {}
    for i in range(len(source)):
        try:
            source.load(i)
        except RejectedRecord as error:
            reasons[error.line] = error.reason.removeprefix(f"{path.name}: ")
    assert reasons == {
        5: "'answer_type' is neither CLOSED nor OPEN",
        6: "an item is no object with 'question'",
        8: "file does not exist in the archive",
        9: "'answer' is empty",
        10: "an item is no object with 'image_name'",
    }


def test_two_forms_in_one_folder_are_not_guessed(tmp_path: Path) -> None:
    fixture.write(tmp_path)
    fixture.write_mevf(tmp_path)
    with pytest.raises(DataError, match="--form public or --form mevf"):
        VqaRadSource(VqaRadOptions(root=tmp_path))
    assert len(VqaRadSource(VqaRadOptions(root=tmp_path, form="public"))) == 5


def test_a_file_that_is_no_list_is_named(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    (root / "VQA_RAD Dataset Public.json").write_text("{}")
    with pytest.raises(DataError, match=r"Public\.json holds no list of objects"):
        VqaRadSource(VqaRadOptions(root=root))

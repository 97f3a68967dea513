"""What a study becomes in its stored square: boxes cut and moved, masks, and what may not be stored."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shards.build import BuildOptions
from shards.masks import decode_masks
from shards.sample import StoredImage, to_sample
from shards.sources.base import RejectedRecord, Source
from shards.study import Box, Phrase, Question, Study
from tests.shards.toy_data import build

#: 40 wide, 20 high: stored in 20 x 20 at half the size, 5 pixels from the top.
STUDY = Study("s", "p", np.zeros((20, 40), np.uint8), labels={"mass": 1, "edema": None})


def stored(study: Study) -> tuple[dict[str, Any], dict[str, bytes], Counter[str]]:
    notes: Counter[str] = Counter()
    sample = to_sample(study, "0-0", StoredImage(size=20, format="png"), notes)
    return json.loads(sample.members["json"]), sample.members, notes


def test_boxes_are_moved_cut_and_left_out() -> None:
    boxes = [
        Box("mass", 4, 2, 10, 6, "left", "R1"),
        Box("mass", -6, 10, 10, 20),
        Box("mass", 40, 0, 5, 5),
        Box("mass", 3, 3, 0, 5),
        Box("mass", 9, 9, -4, 5),
    ]
    phrases = [
        Phrase("a mass", (boxes[0], boxes[2])),
        Phrase("elsewhere", (boxes[2],)),
        Phrase("no place", ()),
    ]
    metadata, _, notes = stored(replace(STUDY, boxes=boxes, anatomy=[boxes[1]], phrases=phrases))
    first = {"label": "mass", "x": 2.0, "y": 6.0, "width": 5.0, "height": 3.0, "side": "left", "reader": "R1"}
    cut = {"label": "mass", "x": 0.0, "y": 10.0, "width": 2.0, "height": 5.0, "side": "", "reader": ""}
    assert metadata["boxes"] == [first, cut]
    assert metadata["anatomy"] == [cut]
    assert metadata["phrases"] == [{"text": "a mass", "boxes": [first]}, {"text": "no place", "boxes": []}]
    assert notes == {
        "boxes were cut at the border of their image": 2,
        "boxes without area in their image were left out": 5,
    }


def test_masks_are_stored_by_name_with_the_image() -> None:
    mass, edema = np.zeros((2, 20, 40), np.uint8)
    mass[2:8, 4:14] = 1
    metadata, members, _ = stored(replace(STUDY, masks={"mass": mass, "edema": edema}))
    assert metadata["masks"] == ["mass", "edema"]
    found = decode_masks(members["masks.png"], 2, 20)
    expected = np.zeros((20, 20), np.uint8)
    expected[6:9, 2:7] = 1
    np.testing.assert_array_equal(found, [expected, np.zeros_like(expected)])
    assert "masks.png" not in stored(STUDY)[1]


@pytest.mark.parametrize(
    "change",
    [
        {"boxes": [Box("mass", float("nan"), 0, 1, 1)]},
        {"boxes": [Box("mass", 0, 0, 1, 1, side="middle")]},
        {"masks": {"mass": np.zeros((40, 20), np.uint8)}},
        {"masks": {"mass": np.full((20, 40), 255, np.uint8)}},
        {"questions": [Question("Is it?", "")]},
        {"questions": [Question("Is it?", "no", kind="other")]},
        {"lists": ["a list"]},
        {"lists": ["train_1", "train_1"]},
    ],
)
def test_a_source_that_gives_what_may_not_be_stored_is_wrong(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the source gives|is not uint8"):
        stored(replace(STUDY, **change))


def test_masks_of_too_many_pixels_are_a_rejected_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.masks.MOST_PIXELS", 799)
    masks = {name: np.zeros((20, 40), np.uint8) for name in ("mass", "edema")}
    with pytest.raises(RejectedRecord, match="more than 799 pixels"):
        stored(replace(STUDY, masks=masks))


def test_more_text_than_readers_take_is_a_rejected_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stored, and the end of the build then failed at its own sample."""
    monkeypatch.setattr("shards.sample.METADATA_LIMIT", 2000)
    stored(replace(STUDY, extra={"note": "x" * 100}))
    with pytest.raises(RejectedRecord, match="more than the 2,000 of a sample"):
        stored(replace(STUDY, extra={"note": "x" * 2000}))


class OneStudy(Source):
    name, label_names, arguments = "one", ["mass"], {}

    def __init__(self, study: Study) -> None:
        self.study = study

    def __len__(self) -> int:
        return 1

    def load(self, i: int) -> list[Study]:
        return [self.study]

    def split_key(self, i: int) -> str:
        return "p"


def test_a_build_counts_cut_boxes_and_refuses_masks_of_no_label(tmp_path: Any) -> None:
    study = replace(STUDY, labels={"mass": 1}, boxes=[Box("mass", -1, 0, 5, 5), Box("mass", 50, 0, 5, 5)])
    summary = build(OneStudy(study), tmp_path / "out", BuildOptions(image=StoredImage(size=20)))
    assert summary.remarks == [
        "boxes were cut at the border of their image: 1",
        "boxes without area in their image were left out: 1",
    ]
    strange = replace(study, masks={"edema": np.zeros((20, 40), np.uint8)})
    with pytest.raises(ValueError, match="not among its label names"):
        build(OneStudy(strange), tmp_path / "other", BuildOptions(image=StoredImage(size=20)))

"""CheXpert Plus: reports of several lines, sections, CheXbert's labels, PNG files under names of JPEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.sources.chexpert_plus import CheXpertPlusOptions, CheXpertPlusSource
from tests.fixtures import chexpert_plus as fixture


def opened(root: Path, **options: Any) -> CheXpertPlusSource:
    return CheXpertPlusSource(CheXpertPlusOptions(root=root, **options))


def test_sections_labels_people_and_splits(tmp_path: Path) -> None:
    source = opened(fixture.write(tmp_path).root)
    first, lateral, valid = (source.load(i)[0] for i in range(3))
    assert first.sections == {
        "narrative": "CHEST 2 VIEWS",
        "history": "Cough.\nSmoker.",
        "comparison": "None.",
        "impression": '1. Small effusion, "stable".\n2. No edema.',
    }
    assert valid.sections == {"findings": "Clear lungs.", "impression": "Normal."}
    assert {name: value for name, value in first.labels.items() if value is not None} == {
        "Pleural Effusion": 1,
        "Edema": 0,
        "Fracture": -1,
    }
    assert set(valid.labels.values()) == {None}  # CheXbert's file has no line for it
    assert (first.view, lateral.view, valid.view) == ("AP", "LATERAL", "PA")
    assert (first.patient_id, first.study_id) == ("patient90009", "patient90009/study2")
    assert [source.prescribed_split(i) for i in range(4)] == ["train", "train", "valid", "train"]
    assert first.extra["race"] == "White, non-Hispanic"
    assert not any("1234567" in text for text in first.sections.values())  # the accession number
    with pytest.raises(RejectedRecord, match="does not exist"):
        source.load(3)


def test_other_labels_or_none(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    source = opened(root, labels="none")
    assert source.label_names == []
    assert source.load(0)[0].labels == {}
    with pytest.raises(
        DataError, match=r"has no chexbert_labels/impression_fixed\.json .*; get it from https"
    ):
        opened(root, labels="impression")


def test_a_patient_that_is_not_the_path_s_is_rejected(tmp_path: Path) -> None:
    table = fixture.write(tmp_path).tables[0]
    table.write_text(table.read_text().replace("PA,patient94541", "PA,patient94542"))
    with pytest.raises(RejectedRecord, match="'path_to_image' and 'deid_patient_id' are about two patients"):
        opened(tmp_path).load(2)

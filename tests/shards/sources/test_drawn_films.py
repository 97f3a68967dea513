"""DICOM films on which boxes and masks were drawn stay as stored, whatever their headers say."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pydicom
import pytest

from shards.sources.registry import sources
from tests.fixtures.dicom import saved


@pytest.mark.parametrize("name", ["rsna", "siim", "vindr"])
def test_films_that_their_header_calls_mirrored_stay_as_stored_and_are_told(
    name: str, tmp_path: Path
) -> None:
    entry = sources()[name]
    root = importlib.import_module(f"tests.fixtures.{name}").write(tmp_path).root
    before = entry.open(entry.options(root=root), 64).load(0)[0]
    for path in [*root.rglob("*.dcm"), *root.rglob("*.dicom")]:
        dataset = pydicom.dcmread(path)
        dataset.PatientOrientation = ["R", "F"]
        path.write_bytes(saved(dataset))
    source = entry.open(entry.options(root=root), 64)
    study = source.load(0)[0]
    np.testing.assert_array_equal(study.image, before.image)
    assert study.boxes == before.boxes
    assert [count for note, count in source.take_notes().items() if "were kept as stored" in note] == [1]
    assert not source.take_notes()

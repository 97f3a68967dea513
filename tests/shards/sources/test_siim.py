"""SIIM-ACR Pneumothorax: masks of run lengths, negatives in two spellings, films found by their name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UsageError
from shards.sources.base import RejectedRecord
from shards.sources.siim import SiimOptions, SiimSource
from tests.fixtures import siim as fixture
from tests.fixtures.archive import film

NAME = "Pneumothorax"


@pytest.fixture
def source(tmp_path: Path) -> SiimSource:
    return SiimSource(SiimOptions(root=fixture.write(tmp_path).root))


def test_a_film_is_one_record_with_all_its_rows(source: SiimSource) -> None:
    films = [source.load(i)[0] for i in range(4)]
    assert len(source) == 6
    assert [film.study_id for film in films] == [fixture.uid(number) for number in range(4)]
    assert [film.labels[NAME] for film in films] == [1, 0, 1, 0]  # "-1" and " -1" are both none
    assert [film.view for film in films] == ["PA", "AP", "PA", "AP"]
    assert np.abs(films[0].image.astype(int) - film(0, 1024, 1024)).mean() < 1
    assert {count.name: (count.found, count.published) for count in source.published_counts()} == {
        "all images": (6, 12_047), "rows": (7, 12_954), "films with pneumothorax": (2, 2_669)
    }  # fmt: skip


def test_runs_are_relative_from_zero_and_column_by_column(source: SiimSource) -> None:
    mask = source.load(0)[0].masks[NAME]
    expected = np.zeros((1024, 1024), dtype=np.uint8)
    expected[200:500, 300:324] = expected[476:500, 300:420] = 1  # an L at the left
    expected[100:180, 600:608] = expected[172:180, 600:640] = 1  # of another row
    np.testing.assert_array_equal(mask, expected)


def test_a_mask_shrinks_with_a_copy_of_the_film(source: SiimSource) -> None:
    expected = np.zeros((128, 128), dtype=np.uint8)
    expected[:80, :2] = expected[78:80, :8] = 1
    np.testing.assert_array_equal(source.load(2)[0].masks[NAME], expected)


def test_a_film_without_pneumothorax_has_a_mask_of_zeros(source: SiimSource) -> None:
    for record in (1, 3):
        assert source.load(record)[0].masks[NAME].shape == (128, 128)
        assert not source.load(record)[0].masks[NAME].any()


def test_a_missing_film_and_one_of_another_are_rejected(source: SiimSource) -> None:
    for record, line, reason in ((4, 7, "by its SOPInstanceUID"), (5, 8, "no DICOM files are named after")):
        with pytest.raises(RejectedRecord, match=reason) as error:
            source.load(record)
        assert error.value.line == line


def test_two_files_of_one_name_are_not_chosen_from(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    shutil.copytree(root / "dicom-images-train", root / "dicom-images-test")
    with pytest.raises(RejectedRecord, match="2 DICOM files are named after the film"):
        SiimSource(SiimOptions(root=root)).load(0)


def test_unknown_patients_and_films_without_rows_are_said(source: SiimSource) -> None:
    said = "\n".join(source.remarks())
    assert "each film counts as a patient of its own" in said
    assert "1 DICOM files have no row" in said


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (["-1", "5 6"], "one row says that there is no pneumothorax, another has one"),
        (["5 6 7"], "'EncodedPixels': run lengths are no pairs"),
        (["1048570 7"], "'EncodedPixels': run lengths leave a mask"),
        (["300000 3 301021 5 302017 900000"], "relative ones were expected"),  # absolute, as others have them
        (["5 0"], "a run without a pixel"),
        ([""], "run lengths are no pairs"),
    ],
)
def test_what_is_no_mask_is_rejected(tmp_path: Path, cells: list[str], reason: str) -> None:
    fixture.write_dicom(tmp_path, 1, 128)
    rows = "".join(f"{fixture.uid(1)},{cell}\n" for cell in cells)
    (tmp_path / "train-rle.csv").write_text("ImageId, EncodedPixels\n" + rows)
    with pytest.raises(RejectedRecord, match=reason):
        SiimSource(SiimOptions(root=tmp_path)).load(0)


def test_numbers_of_the_first_stage(tmp_path: Path) -> None:
    source = SiimSource(SiimOptions(root=fixture.write(tmp_path).root, stage=1))
    assert [count.published for count in source.published_counts()] == [10_675, 11_582, 2_379]


def test_kaggles_copy_with_png_files(tmp_path: Path) -> None:
    root = fixture.write_png(tmp_path / "siim-acr-pneumothorax").parent
    with pytest.raises(UsageError, match="--window is of DICOM files"):
        SiimSource(SiimOptions(root=root, window="equalize"))
    for stage in (1, 2):
        with pytest.raises(UsageError, match="--stage is of the DICOM files"):
            SiimSource(SiimOptions(root=root, stage=stage))
    source = SiimSource(SiimOptions(root=root))
    films = [source.load(i)[0] for i in (0, 1, 3)]
    assert [source.prescribed_split(i) for i in range(4)] == ["train"] * 3 + ["test"]
    assert [film.study_id for film in films] == [fixture.uid(i) for i in (0, 1, 3)]
    assert [film.labels[NAME] for film in films] == [1, 0, 1]
    assert (films[2].image == film(3)).all()
    expected = np.zeros((96, 80), dtype=np.uint8)
    expected[10:23, 30:60] = 1
    np.testing.assert_array_equal(films[2].masks[NAME], expected)
    assert not films[1].masks[NAME].any()
    with pytest.raises(RejectedRecord, match="does not exist"):
        source.load(2)
    assert {count.name: (count.found, count.published) for count in source.published_counts()} == {
        "train images": (3, 10_675), "test images": (1, 1_372), "films with pneumothorax": (3, 2_669)
    }  # fmt: skip
    shutil.copy(root / "siim-acr-pneumothorax" / "png_masks" / "1_train_0_.png", tmp_path / "empty.png")
    shutil.move(tmp_path / "empty.png", root / "siim-acr-pneumothorax" / "png_masks" / "0_train_1_.png")
    with pytest.raises(RejectedRecord, match="'has_pneumo' and the mask contradict each other"):
        source.load(0)


@pytest.mark.shared
def test_a_real_film_is_found_by_its_name(shared: Path, tmp_path: Path) -> None:
    name = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819"
    folder = tmp_path / "dicom-images-train" / "study" / "series"
    folder.mkdir(parents=True)
    shutil.copy(shared / "data" / "dicom" / f"xrv_{name}.dcm", folder / f"{name}.dcm")
    (tmp_path / "train-rle.csv").write_text(
        f"ImageId, EncodedPixels\n{name},{fixture.relative_runs(fixture.FIRST)}\n"
    )
    study = SiimSource(SiimOptions(root=tmp_path)).load(0)[0]
    assert (study.view, study.image.shape) == ("PA", (1024, 1024))
    assert study.image.std() > 30
    np.testing.assert_array_equal(study.masks[NAME], fixture.FIRST)

"""object-CXR: shapes become boxes and masks."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UsageError
from shards.sources.base import RejectedRecord
from shards.sources.object_cxr import ObjectCxrOptions, ObjectCxrSource, parse_shapes
from shards.study import Box
from tests.fixtures import object_cxr as fixture
from tests.fixtures.archive import film, write_film, write_table

OBJECT = "Foreign Object"


@pytest.fixture
def source(tmp_path: Path) -> ObjectCxrSource:
    return ObjectCxrSource(ObjectCxrOptions(root=fixture.write(tmp_path).root))


def test_boxes_and_labels(source: ObjectCxrSource) -> None:
    films = [source.load(i)[0] for i in (0, 1, 2, 3, 6, 7)]
    assert [film.boxes for film in films] == [
        [Box(OBJECT, 10, 20, 30, 10), Box(OBJECT, 50, 60, 20, 30)],
        [],
        [Box(OBJECT, 20, 10, 40, 30)],
        [Box(OBJECT, 30, 80, 40, 30), Box(OBJECT, -5, -5, 14, 14)],
        [Box(OBJECT, 10, 10, 30, 20)],
        [],
    ]
    assert [film.study_id for film in films[::4]] == ["train/00077.jpg", "dev/00077.jpg"]  # two films
    assert [film.labels[OBJECT] for film in films] == [1, 0, 1, 1, 1, 0]
    assert [source.prescribed_split(i) for i in range(8)] == ["train"] * 6 + ["valid"] * 2
    assert [film.image.shape for film in films] == [(120, 100), (128, 100), (136, 100), (144, 100)] + [
        (96, 80)
    ] * 2
    assert np.abs(films[4].image.astype(int) - film(6)).mean() < 8  # JPEG of a sharp square


def test_a_rectangle_and_a_polygon_are_drawn_with_their_edges(source: ObjectCxrSource) -> None:
    mask = source.load(0)[0].masks[OBJECT]
    rows, columns = np.mgrid[:120, :100]
    rectangle = (columns >= 10) & (columns <= 40) & (rows >= 20) & (rows <= 30)
    # Right angle at (50, 60), legs of 20 to the right and 30 downwards.
    triangle = (columns >= 50) & (rows >= 60) & ((columns - 50) / 20 + (rows - 60) / 30 <= 1)
    assert mask.shape == (120, 100)
    assert (mask[:, :45] == rectangle[:, :45]).all()
    assert (mask[:, 45:] != triangle[:, 45:]).sum() <= 12  # pixels that the slanted edge cuts


def test_an_ellipse_fills_its_box_by_a_quarter_of_pi(source: ObjectCxrSource) -> None:
    mask = source.load(2)[0].masks[OBJECT]
    rows, columns = np.mgrid[:136, :100]
    away = ((columns - 40) / 20) ** 2 + ((rows - 25) / 15) ** 2
    assert mask[away < 0.9].all()
    assert not mask[away > 1.15].any()


def test_shapes_across_the_border_are_cut_and_none_is_a_mask_of_zeros(source: ObjectCxrSource) -> None:
    crossing = source.load(3)[0].masks[OBJECT]
    assert crossing[:10, :10].all()
    assert not crossing[:, 10:30].any()
    assert crossing[80:111, 30:71].all()
    assert crossing.sum() == 10 * 10 + 31 * 41
    empty = source.load(1)[0].masks[OBJECT]
    assert empty.shape == (128, 100)
    assert not empty.any()


def test_a_cut_annotation_and_a_missing_film_are_rejected(source: ObjectCxrSource) -> None:
    for record, reason in (
        (4, "'annotation': a rectangle or an ellipse has not four"),
        (5, "does not exist"),
    ):
        with pytest.raises(RejectedRecord, match=reason) as error:
            source.load(record)
        assert error.value.line == record + 2


@pytest.mark.parametrize(
    "text",
    [
        "3 1 2 3 4",
        "0",
        "0 1 2 3 x",
        "0 1 2 3 nan",
        "0 1 2 3 1e9",
        "2 1 2 3 4",
        "2 1 2 3 4 5 6 7",
        "1 1 2 3 4 5 6",
    ],
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"shape|coordinate|polygon"):
        parse_shapes(f"0 1 2 3 4;{text}")


def test_the_test_part_and_what_dev_is(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    dev = ObjectCxrSource(ObjectCxrOptions(root=root, dev="test"))
    assert [dev.prescribed_split(i) for i in (5, 6, 7)] == ["train", "test", "test"]
    assert {count.name: (count.found, count.published) for count in dev.published_counts()} == {
        "train images": (6, 8_000), "train films with objects": (5, 4_000),
        "test images": (2, 1_000), "test films with objects": (1, 500),
    }  # fmt: skip
    write_table(root / "test.csv", fixture.HEADER, [("09001.jpg", "")])
    write_film(root / "test" / "09001.jpg", 9)
    assert ObjectCxrSource(ObjectCxrOptions(root=root)).prescribed_split(8) == "test"
    with pytest.raises(UsageError, match="leave --dev out"):
        ObjectCxrSource(ObjectCxrOptions(root=root, dev="test"))


def test_lists_may_name_the_part(tmp_path: Path) -> None:
    root = fixture.write(tmp_path / "films").root
    (tmp_path / "both.txt").write_text("00077.jpg\n")
    (tmp_path / "one.txt").write_text("dev/00077.jpg\n")
    lists = [f"{name}={tmp_path / name}.txt" for name in ("both", "one")]
    source = ObjectCxrSource(ObjectCxrOptions(root=root, split_list=lists))
    assert [source.lists(i) for i in (0, 1, 6)] == [["both"], [], ["both", "one"]]


def test_a_zip_of_a_part_may_have_no_folder_and_is_asked_for_its_part_only(tmp_path: Path) -> None:
    root = fixture.write(tmp_path).root
    for part in ("train", "dev"):
        with zipfile.ZipFile(root / f"{part}.zip", "w") as packed:
            for path in sorted((root / part).iterdir()):
                packed.write(path, path.name)
                path.unlink()
    with zipfile.ZipFile(root / "dev.zip", "a") as packed:
        packed.writestr("00082.jpg", b"not the film of the train part")
    source = ObjectCxrSource(ObjectCxrOptions(root=root))
    assert source.load(0)[0].image.shape == (120, 100)
    assert source.load(6)[0].image.shape == (96, 80)
    with pytest.raises(RejectedRecord, match="does not exist"):
        source.load(5)

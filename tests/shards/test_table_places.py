"""Images that a file turns or that are too large, masks by a rule, boxes that are no pixels: not stored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.errors import DataError
from shards.format import IMAGE_LIMIT
from shards.sources.base import RejectedRecord
from shards.sources.table import TableSource
from tests.shards.test_table_targets import (
    ABSOLUTE,
    BOXES,
    HEIGHT,
    SHAPE,
    WIDTH,
    Opener,
    box,
    loaded,
    save,
)
from tests.shards.test_table_targets import opened as opened


def test_a_huge_image_file_is_rejected_unread(opened: Opener, tmp_path: Path) -> None:
    os.truncate(tmp_path / "images" / "b.png", IMAGE_LIMIT + 1)  # takes no room on the disk
    source = opened([{}, {"image": "b.png"}], "")
    assert loaded(source, 0).image is not None
    with pytest.raises(RejectedRecord, match=r"^file: \d+ bytes, more than the limit of"):
        source.load(1)


@pytest.mark.parametrize(
    ("more", "cells"),
    [
        (BOXES, box()),
        ("anatomy: {x: x, y: y, width: w, height: h, label: what}\n", box()),
        ("masks: {Mass: {rle: rle, kind: absolute}}\n", {"rle": ABSOLUTE}),
        (
            "phrases: said\n",
            {"said": '[{"text": "a", "boxes": [{"x": 1, "y": 2, "width": 3, "height": 4}]}]'},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_places_in_an_image_that_its_file_turns_are_rejected(
    more: str, cells: dict[str, Any], kind: str, opened: Opener, tmp_path: Path
) -> None:
    """They were stored beside the turned image as they stood, whatever they had been drawn on."""
    exif = Image.Exif()
    exif[274] = 3
    plain = np.full((HEIGHT, WIDTH), 90, np.uint8)
    Image.fromarray(plain).save(tmp_path / "images" / f"turned.{kind}", exif=exif)
    exif[274] = 1
    Image.fromarray(plain).save(tmp_path / "images" / f"upright.{kind}", exif=exif)
    rows = [cells | {"image": f"{name}.{kind}"} for name in ("turned", "upright")]
    source = opened(rows, more)
    with pytest.raises(
        RejectedRecord, match="EXIF orientation 3 turns the image, and boxes or masks"
    ) as caught:
        source.load(0)
    assert caught.value.line == 2
    assert loaded(source, 1).image.shape == (HEIGHT, WIDTH)


def test_an_image_that_its_file_turns_is_taken_without_places(opened: Opener, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    stored = Image.fromarray(np.full((HEIGHT, WIDTH), 90, np.uint8))
    stored.save(tmp_path / "images" / "turned.jpg", exif=exif)
    source = opened([box(image="turned.jpg", x="", y="", w="", h="", what="")], BOXES)
    assert loaded(source).image.shape == (WIDTH, HEIGHT)


@pytest.mark.parametrize("rows", ["", "rows: target\n"])
def test_the_mask_file_of_several_images_is_nobodys(rows: str, opened: Opener, tmp_path: Path) -> None:
    """Images of one name in folders of patients all had the mask of one of them."""
    images = tmp_path / "images"
    save(images / "masks" / "view1.png", SHAPE * 255)
    for patient in ("p1", "p2"):
        for view in ("view1", "view2"):
            save(images / patient / f"{view}.png", np.full((HEIGHT, WIDTH), 90, np.uint8))
    given = [{"image": f"{folder}/{view}.png", "patient": folder}
             for folder in ("p1", "p2") for view in ("view1", "view2")]  # fmt: skip
    nameless = [] if rows else [{"image": ""}]
    source = opened([*given, *nameless], f"{rows}masks:\n  mass: {{file: 'masks/{{stem}}.png'}}\n")
    for i in (0, 2):
        with pytest.raises(RejectedRecord, match=r"names one file for several images; put \{path\} in it"):
            source.load(i)
    assert loaded(source, 1).masks == loaded(source, 3).masks == {}, "there is no file, so none is mistaken"
    save(images / "p1" / "view1-mask.png", SHAPE * 255)
    source = opened(given, f"{rows}masks:\n  mass: {{file: '{{path}}-mask.png'}}\n")
    assert [bool(loaded(source, i).masks) for i in range(4)] == [True, False, False, False]


def test_boxes_in_shares_of_the_image_are_refused(opened: Opener) -> None:
    """Stored as pixels they would all lie in one corner."""
    shares = {"x": 0.25, "y": 0.5, "w": 0.5, "h": 0.5}
    with pytest.raises(DataError, match="all boxes of boxes lie within the first pixel"):
        opened([box(**shares), box(image="b.png", **shares)], BOXES)
    assert len(opened([box(**shares), box(image="b.png")], BOXES)) == 2


@pytest.mark.parametrize("kind", ["anatomy", "phrases"])
def test_anatomy_and_phrases_in_shares_of_the_image_are_refused(kind: str, opened: Opener) -> None:
    """Beside boxes in pixels too, which say nothing of these."""

    def cell(side: float) -> str:
        place = {"label": "mass", "x": 0.25, "y": 0.5, "width": side, "height": 0.5}
        return json.dumps([place] if kind == "anatomy" else [{"text": "a mass", "boxes": [place]}])

    rows = [box(told=cell(0.5)), box(image="b.png", told=cell(0.25))]
    with pytest.raises(DataError, match=f"all boxes of {kind} lie within the first pixel"):
        opened(rows, f"{BOXES}{kind}: told\n")
    assert len(opened([*rows, box(image="c.png", told=cell(2))], f"{BOXES}{kind}: told\n")) == 3


def test_a_row_that_cannot_be_read_stops_a_table_of_several_rows_an_image(
    opened: Opener, tmp_path: Path
) -> None:
    """Its image was stored with the targets of the other rows, as if these were all."""
    table, map_file = tmp_path / "t.csv", tmp_path / "map.yaml"
    opened([box(), box(what="edema"), box(image="b.png")], BOXES + "rows: target\n")
    text = table.read_text()
    line = text.splitlines()[2]
    for broken, reason in ((f"{line},", "line 3: .*cells"), (line.replace("a.png", ""), "names no image")):
        table.write_text(text.replace(line, broken, 1))
        with pytest.raises(DataError, match=f"{reason}.*rows: target"):
            TableSource(table, tmp_path / "images", map_file)
    map_file.write_text(map_file.read_text().replace("rows: target\n", ""))
    assert len(TableSource(table, tmp_path / "images", map_file)) == 3, "here the row is a record"

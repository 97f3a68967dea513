"""Boxes, masks, phrases, questions and lists of a table, compared with truth written by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.build import BuildOptions
from shards.errors import DataError
from shards.format import IMAGE_LIMIT
from shards.masks import encode_runs
from shards.reader import ShardReader
from shards.sample import StoredImage
from shards.sources.base import RejectedRecord
from shards.sources.table import TableSource
from shards.study import Box, Phrase, Question, Study
from tests.shards.test_table import rejections, samples
from tests.shards.toy_data import build, write_csv

MAP = "image: image\npatient_id: patient\n"
#: An image is 6 wide and 8 high; the mask is an L, which neither turned nor mirrored is the same.
WIDTH, HEIGHT = 6, 8
SHAPE = np.array(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ],
    np.uint8,
)
#: Column 1 begins at pixel 8, from 0; its rows 1 to 4, then row 4 of columns 2 and 3.
ABSOLUTE = "10 4 21 1 29 1"
RELATIVE = "9 4 7 1 7 1"
BY_ROWS = "8 1 14 1 20 1 26 3"
BOXES = "boxes: {x: x, y: y, width: w, height: h, label: what, side: side, reader: who}\n"
Rows = list[dict[str, Any]]
Opener = Callable[..., TableSource]


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    """`opened(rows, more of the map)` -> source; images a.png to d.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abcd":
        Image.fromarray(np.full((HEIGHT, WIDTH), 90, np.uint8)).save(folder / f"{name}.png")

    def open_source(rows: Rows, more: str, kind: str = "csv") -> TableSource:
        rows = [{"image": "a.png", "patient": "p", **row} for row in rows]
        table = tmp_path / f"t.{kind}"
        if kind == "csv":
            write_csv(table, rows)
        else:
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "map.yaml").write_text(MAP + more)
        return TableSource(table, folder, tmp_path / "map.yaml")

    return open_source


def box(**changes: object) -> dict[str, Any]:
    return {"x": 1, "y": 2, "w": 3, "h": 4, "what": "mass", "side": "", "who": ""} | changes


def loaded(source: TableSource, i: int = 0) -> Study:
    (study,) = source.load(i)
    return study


def test_run_lengths_by_hand() -> None:
    assert encode_runs(SHAPE, "absolute") == ABSOLUTE
    assert encode_runs(SHAPE, "relative") == RELATIVE
    assert encode_runs(SHAPE, "absolute", "rows") == BY_ROWS


def test_one_box_a_row_and_images_without(opened: Opener) -> None:
    rows = [box(side="Left", who="R1"), box(image="b.png", x="", y="", w="", h="", what="")]
    source = opened(rows, BOXES)
    assert loaded(source).boxes == [Box("mass", 1, 2, 3, 4, "left", "R1")]
    assert loaded(source, 1).boxes == []
    assert source.label_names == ["mass"]
    assert [loaded(source, i).labels for i in (0, 1)] == [{"mass": 1}, {"mass": None}]


def test_corners_in_place_of_sizes_and_one_finding_for_all(opened: Opener) -> None:
    more = "boxes: {x: x, y: y, right: r, bottom: b, finding: nodule}\nlabels: [mass]\n"
    source = opened([{"x": 1, "y": 2, "r": 4.5, "b": 7, "mass": 0}], more)
    assert loaded(source).boxes == [Box("nodule", 1, 2, 3.5, 5)]
    assert loaded(source).labels == {"mass": 0, "nodule": 1}


def test_several_rows_of_an_image_are_one_record(opened: Opener, tmp_path: Path) -> None:
    rows = [box(), box(image="b.png", patient="q"), box(what="edema", x=0), box(image="c.png", patient="r")]
    source = opened(rows, BOXES + "rows: target\n")
    assert len(source) == 3
    assert [loaded(source, i).patient_id for i in range(3)] == ["p", "q", "r"]
    assert loaded(source).boxes == [Box("mass", 1, 2, 3, 4), Box("edema", 0, 2, 3, 4)]
    assert [source.split_key(i) for i in range(3)] == ["p", "q", "r"]
    build(source, tmp_path / "out", BuildOptions(image=StoredImage(size=16)))
    assert len(samples(tmp_path / "out")["00000000-0"]["boxes"]) == 2
    # Without `rows: target` the second row of an image is a repeated one.
    with pytest.raises(RejectedRecord, match=r"^duplicate image \(the map's rows: target joins the rows of"):
        opened(rows, BOXES).load(2)


def test_rows_of_an_image_that_contradict_each_other_are_rejected(opened: Opener) -> None:
    source = opened([box(), box(image="b.png"), box(patient="q")], BOXES + "rows: target\n")
    with pytest.raises(RejectedRecord, match="rows of one image differ in column 'patient'") as caught:
        source.load(0)
    assert caught.value.line == 4
    assert loaded(source, 1).boxes


def test_a_column_of_boxes_may_not_label_whole_images(opened: Opener) -> None:
    """Of several rows only the first would be asked."""
    with pytest.raises(DataError, match="rows: target: column 'what' stands for more"):
        opened([box()], BOXES + "rows: target\nlabels:\n  mass: {column: what, equals: mass}\n")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"w": "wide"}, "column 'w' of boxes holds no number"),
        ({"w": ""}, "column 'w' of boxes holds no number"),
        ({"w": "inf"}, "column 'w' of boxes holds no number"),
        ({"w": "-1"}, "a box of boxes ends before it begins"),
        ({"what": ""}, "column 'what' of boxes is empty beside a box"),
        ({"side": "middle"}, "column 'side' holds neither left nor right"),
    ],
)
def test_a_malformed_box_rejects_its_record_with_its_line(
    opened: Opener, tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    rows = [box(), box(**changes), box(image="b.png")]
    source = opened(rows, BOXES + "rows: target\n")
    build(source, tmp_path / "out", BuildOptions(image=StoredImage(size=16)))
    assert rejections(tmp_path / "out") == {0: reason}
    assert '"line": 3' in (tmp_path / "out" / "rejected.jsonl").read_text()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_json_columns(opened: Opener, kind: str) -> None:
    place = {"label": "mass", "x": 1, "y": 2.5, "width": 3, "height": 4, "side": "left", "reader": "R1"}
    corners = {"label": "mass", "x": 1, "y": 2, "right": 4, "bottom": 3}
    questions = [
        {"question": "Is it?", "answer": "yes", "kind": "CLOSED", "topic": "Presence"},
        {"question": "¿Qué?", "answer": "nada", "language": "es"},
    ]
    values = {
        "b": [place, corners], "a": [{**corners, "label": "heart"}],
        "p": [{"text": "a mass", "boxes": [{name: corners[name] for name in ("x", "y", "right", "bottom")}]}],
        "q": questions,
    }  # fmt: skip
    row = {
        name: json.dumps(value, ensure_ascii=False) if kind == "csv" else value
        for name, value in values.items()
    }
    study = loaded(opened([row], "boxes: b\nanatomy: a\nphrases: p\nquestions: q\n", kind))
    assert study.boxes == [Box("mass", 1, 2.5, 3, 4, "left", "R1"), Box("mass", 1, 2, 3, 1)]
    assert study.anatomy == [Box("heart", 1, 2, 3, 1)]
    assert study.phrases == [Phrase("a mass", (Box("", 1, 2, 3, 1),))]
    assert study.questions == [
        Question("Is it?", "yes", "closed", "presence"), Question("¿Qué?", "nada", language="es"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "cell",
    [
        "[", "{}", "[1]", '[{"label": "mass"}]', '[{"label": "", "x": 1, "y": 1, "width": 1, "height": 1}]',
        '[{"label": "m", "x": 1, "y": 1, "width": -1, "height": 1}]',
        '[{"label": "m", "x": 1, "y": 1, "width": NaN, "height": 1}]',
        '[{"label": "m", "x": true, "y": 1, "width": 1, "height": 1}]',
        '[{"label": "m", "x": 1, "y": 1, "width": 1, "height": 1, "right": 2}]',
        '[{"label": "m", "x": 1, "y": 1, "width": 1, "height": 1, "side": "up"}]',
    ],
)  # fmt: skip
def test_malformed_json_rejects_the_record(opened: Opener, cell: str) -> None:
    source = opened([{"b": "[]"}, {"image": "b.png", "b": cell}], "boxes: b\n")
    assert loaded(source).boxes == []
    with pytest.raises(
        RejectedRecord, match=r"column 'b' (of boxes holds no JSON|is no JSON list of boxes)"
    ) as caught:
        source.load(1)
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("{rle: runs, kind: absolute}", ABSOLUTE),
        ("{rle: runs, kind: relative}", RELATIVE),
        ("{rle: runs, kind: absolute, order: rows}", BY_ROWS),
        ("{rle: runs, kind: relative, size: [6, 8]}", RELATIVE),
    ],
)
def test_run_lengths_become_masks(opened: Opener, tmp_path: Path, rule: str, text: str) -> None:
    rows = [{"runs": text}, {"image": "b.png", "runs": " -1"}, {"image": "c.png", "runs": ""}]
    source = opened(rows, f"masks:\n  Pneumothorax: {rule}\n")
    np.testing.assert_array_equal(loaded(source).masks["Pneumothorax"], SHAPE)
    assert not loaded(source, 1).masks["Pneumothorax"].any()
    assert loaded(source, 2).masks == {}
    assert [loaded(source, i).labels["Pneumothorax"] for i in range(3)] == [1, 0, None]
    build(source, tmp_path / "out", BuildOptions(image=StoredImage(size=8), fractions={"train": 1.0}))
    stored = ShardReader(tmp_path / "out").masks("train", 0)["Pneumothorax"]
    np.testing.assert_array_equal(stored[:, 1:7], SHAPE)


def test_masks_of_several_rows_are_joined(opened: Opener) -> None:
    """The archive of SIIM and ACR has up to ten rows an image."""
    rows = [{"runs": "9 4"}, {"runs": "20 1 7 1"}, {"runs": ""}]
    rows += [{"image": "b.png", "runs": runs} for runs in ("-1", "-1")]
    rows += [{"image": "c.png", "runs": runs} for runs in ("9 4", "-1")]
    source = opened(rows, "rows: target\nmasks:\n  Pneumothorax: {rle: runs, kind: relative}\n")
    np.testing.assert_array_equal(loaded(source).masks["Pneumothorax"], SHAPE)
    assert not loaded(source, 1).masks["Pneumothorax"].any()
    with pytest.raises(
        RejectedRecord, match="one row says that nothing is there, another has a mask"
    ) as caught:
        source.load(2)
    assert caught.value.line == 8


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("absolute", "10 4 21", "no pairs"),
        ("absolute", "0 4", "leave a mask of 6 x 8"),
        ("absolute", "46 4", "leave a mask of 6 x 8"),
        ("absolute", RELATIVE, "do not increase"),
        ("relative", ABSOLUTE, "leave a mask of 6 x 8"),
        ("relative", "9 0", "without a pixel"),
        ("relative", "nine four", "no pairs"),
    ],
)
def test_malformed_run_lengths_reject_the_record(opened: Opener, kind: str, text: str, reason: str) -> None:
    source = opened([{"runs": text}], f"masks:\n  mass: {{rle: runs, kind: {kind}}}\n")
    with pytest.raises(RejectedRecord, match=f"mask of 'mass': .*{reason}") as caught:
        source.load(0)
    assert caught.value.line == 2


def save(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(mask).save(path)


def test_png_masks_by_column_and_by_place(opened: Opener, tmp_path: Path) -> None:
    save(tmp_path / "images" / "masks" / "a.png", SHAPE * 255)
    save(tmp_path / "images" / "other.png", SHAPE[:, ::-1].astype(np.uint16) * 300)
    more = "masks:\n  mass: {file: 'masks/{stem}.png'}\n  edema: {png: path}\n"
    source = opened([{"path": "other.png"}, {"image": "b.png", "path": ""}], more)
    np.testing.assert_array_equal(loaded(source).masks["mass"], SHAPE)
    np.testing.assert_array_equal(loaded(source).masks["edema"], SHAPE[:, ::-1])
    assert source.take_notes() == {}
    assert loaded(source, 1).masks == {}
    assert source.take_notes() == {"images have no file of the mask of 'mass'": 1}


def test_a_mask_is_scaled_to_an_image_of_its_proportions_only(opened: Opener, tmp_path: Path) -> None:
    save(tmp_path / "images" / "large.png", np.kron(SHAPE, np.ones((10, 10), np.uint8)))
    save(
        tmp_path / "images" / "turned.png",
        np.ascontiguousarray(np.kron(SHAPE, np.ones((10, 10), np.uint8)).T),
    )
    source = opened([{"m": "large.png"}, {"image": "b.png", "m": "turned.png"}], "masks:\n  mass: {png: m}\n")
    np.testing.assert_array_equal(loaded(source).masks["mass"], SHAPE)
    assert source.take_notes() == {"masks were scaled to the size of their image": 1}
    with pytest.raises(RejectedRecord, match="is 80 x 60 pixels, its image 6 x 8"):
        source.load(1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the file does not exist"),
        (b"no PNG", "no PNG or a broken one"),
        (SHAPE * 100 + np.eye(HEIGHT, WIDTH, dtype=np.uint8), "more than two values"),
        (SHAPE[:4] * 255, "is 6 x 4 pixels"),
        (IMAGE_LIMIT + 1, "bytes, more than the limit"),
    ],
)
def test_a_bad_mask_file_rejects_the_record(
    opened: Opener, tmp_path: Path, content: Any, reason: str
) -> None:
    path = tmp_path / "images" / "m.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, int):
        path.touch()
        os.truncate(path, content)
    elif content is not None:
        save(path, content)
    with pytest.raises(RejectedRecord, match=f"mask of 'mass': .*{reason}"):
        opened([{"m": "m.png"}], "masks:\n  mass: {png: m}\n").load(0)


def test_mask_files_stay_below_the_image_folder(opened: Opener, tmp_path: Path) -> None:
    save(tmp_path / "outside.png", SHAPE)
    for more in ("masks:\n  mass: {png: m}\n", "masks:\n  mass: {file: '../{stem}.png'}\n"):
        with pytest.raises(RejectedRecord, match="leaves the image folder"):
            opened([{"m": "../outside.png"}], more).load(0)


def test_phrases_of_rows_belong_to_the_boxes_of_their_rows(opened: Opener) -> None:
    rows = [
        box(text="small mass", x=1), box(text="small mass", x=2),
        box(text="clear elsewhere", x="", y="", w="", h=""), box(text="", x=3),
    ]  # fmt: skip
    study = loaded(opened(rows, BOXES + "rows: target\nphrases: {text: text}\n"))
    first, second, third = (Box("mass", x, 2, 3, 4) for x in (1, 2, 3))
    assert study.boxes == [first, second, third]
    assert study.phrases == [Phrase("small mass", (first, second)), Phrase("clear elsewhere", ())]


def test_questions_of_rows(opened: Opener, tmp_path: Path) -> None:
    more = "rows: target\nquestions: {question: q, answer: a, kind: k, topic: t}\n"
    rows = [
        {"q": "Is it?", "a": "Yes", "k": "CLOSED", "t": "PRES"},
        {"q": "", "a": "", "k": "", "t": ""},
        {"image": "b.png", "q": "Is it?", "a": "", "k": "", "t": ""},
        {"image": "c.png", "q": "Is it?", "a": "no", "k": "maybe", "t": ""},
    ]
    source = opened(rows, more)
    assert loaded(source).questions == [Question("Is it?", "Yes", "closed", "pres")]
    for i in (1, 2):
        with pytest.raises(RejectedRecord, match="lacks question or answer, or its kind"):
            source.load(i)


def test_lists_by_columns_and_by_names(opened: Opener, tmp_path: Path) -> None:
    rows = [
        {"train_1": "1", "train_10": "1", "in": "a| b-2 |"},
        {"image": "b.png", "train_1": "0", "train_10": "", "in": ""},
        {"image": "c.png", "train_1": "yes", "train_10": "", "in": "a list"},
    ]  # fmt: skip
    columns, names = opened(rows, "lists: [train_1, train_10]\n"), opened(rows, "lists: in\n")
    assert [loaded(columns, i).lists for i in (0, 1)] == [["train_1", "train_10"], []]
    assert [loaded(names, i).lists for i in (0, 1)] == [["a", "b-2"], []]
    with pytest.raises(RejectedRecord, match="list column 'train_1' holds neither 1 nor 0"):
        columns.load(2)
    with pytest.raises(RejectedRecord, match="no plain names of lists"):
        names.load(2)
    build(columns, tmp_path / "out", BuildOptions(image=StoredImage(size=16)))
    assert samples(tmp_path / "out")["00000000-0"]["lists"] == ["train_1", "train_10"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("rows: box\n", "rows: 'box' is neither image nor target"),
        (
            "boxes: {x: x, y: y, label: l}\n",
            "name the columns x, y, and width and height or right and bottom",
        ),
        ("boxes: {x: x, y: y, width: w, bottom: b, label: l}\n", "right and bottom"),
        ("boxes: {x: x, y: y, width: w, height: h}\n", "give label .* or finding"),
        ("boxes: {x: x, y: y, width: w, height: h, lable: l}\n", "unknown key 'lable', did you mean 'label'"),
        ("masks: runs\n", "masks: give"),
        ("masks:\n  mass: runs\n", "masks: mass: give"),
        ("masks:\n  mass: {rle: runs}\n", "masks: mass: give"),
        ("masks:\n  mass: {rle: runs, kind: kaggle}\n", "neither absolute nor relative"),
        ("masks:\n  mass: {rle: runs, kind: relative, size: [1024]}\n", "size: give"),
        ("masks:\n  mass: {rle: runs, kind: relative, size: [60000, 60000]}\n", "size: more than"),
        ("masks:\n  mass: {file: mask.png}\n", "must stand in it"),
        ("phrases: {text: t}\n", "takes the box of the row"),
        ("questions: {question: q}\n", "question and answer"),
        ("lists: [a, a]\n", "each once"),
        ("lists: ['a list']\n", "names are letters"),
    ],
)
def test_a_wrong_map_is_one_clear_line(opened: Opener, more: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"map\.yaml: .*{message}"):
        opened([{}], more)


def test_a_column_of_other_text_is_not_taken_for_labels(opened: Opener) -> None:
    rows = [box(image=f"{n}.png", what=f"{n}") for n in range(300)]
    with pytest.raises(DataError, match="more than 256 different labels"):
        opened(rows, BOXES)

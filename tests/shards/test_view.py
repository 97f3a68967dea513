"""What a cell of the contact sheet says."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.images import encode_jpeg
from shards.view import _BOX_COLOURS, _CELL, _MOST_LINES, _cell, _lines

FONT = ImageFont.load_default(12)


def metadata(**changes: object) -> dict[str, object]:
    return {
        "view": "PA",
        "license": "CC0",
        "labels": {"edema": 0},
        "sections": {"findings": "Clear.", "impression": "Normal."},
        "boxes": [],
        "anatomy": [],
        "phrases": [],
        "questions": [],
    } | changes


def lines(**changes: object) -> list[str]:
    draw = ImageDraw.Draw(Image.new("RGB", (8, 8)))
    return [text for text, _ in _lines(draw, "0-0", metadata(**changes), FONT)]


def test_sections_stand_under_their_names() -> None:
    assert lines() == ["0-0 PA CC0", "no label present", "FINDINGS: Clear.", "IMPRESSION: Normal."]


def test_an_unknown_label_is_not_called_absent() -> None:
    assert lines(labels={"edema": None})[1] == "not labelled"
    assert lines(labels={"edema": -1, "mass": 1, "nodule": 0})[1] == "edema?, mass"


def test_a_long_report_is_cut_and_says_so() -> None:
    shown = lines(sections={"findings": "No effusion. " * 200})
    assert len(shown) == _MOST_LINES
    assert shown[-1] == "..."


def test_a_cell_is_as_high_as_its_text_and_labels_do_not_hide_each_other() -> None:
    image = encode_jpeg(np.zeros((64, 64), np.uint8))
    box = {"x": 10.0, "y": 30.0, "width": 20.0, "height": 20.0}
    one = _cell("0-0", image, metadata(boxes=[box | {"label": "mass"}]), {}, FONT)
    both = _cell(
        "0-0", image, metadata(boxes=[box | {"label": name} for name in ("mass", "nodule")]), {}, FONT
    )
    long = _cell("0-0", image, metadata(sections={"findings": "No effusion. " * 20}), {}, FONT)
    assert _CELL < one.height < long.height
    picture = np.asarray(both)[:_CELL]
    # Each label has its own colour; both are seen, on different lines.
    rows = [np.flatnonzero((picture == colour).all(axis=-1).any(axis=1)) for colour in _colours_of(both)]
    assert len(rows) == 2
    assert all(len(found) for found in rows)
    assert rows[0].min() != rows[1].min()


def test_everything_with_a_place_is_drawn_there_and_the_rest_is_written() -> None:
    image = encode_jpeg(np.zeros((64, 64), np.uint8))
    scale = _CELL // 64
    mask = np.zeros((64, 64), np.uint8)
    mask[40:50, 4:34] = 1
    anatomy = {"label": "heart", "x": 30, "y": 2, "width": 20, "height": 30}
    place = {"label": "", "x": 50.0, "y": 40.0, "width": 10.0, "height": 20.0}
    phrases = [{"text": "a small mass", "boxes": [place]}]
    questions = [{"question": "Is there a mass?", "answer": "yes"}]
    shown = metadata(anatomy=[anatomy], phrases=phrases, questions=questions)
    masks = {"mass": mask, "edema": np.zeros_like(mask)}
    picture = np.asarray(_cell("0-0", image, shown, masks, FONT))[:_CELL].astype(int)
    colour = np.array(_BOX_COLOURS[0])
    np.testing.assert_array_equal(picture[40 * scale, 10 * scale], colour)  # the outline
    inside = picture[45 * scale, 20 * scale]
    np.testing.assert_allclose(inside, colour / 4, atol=2)
    np.testing.assert_array_equal(picture[20 * scale, 30 * scale], (190, 190, 190))
    np.testing.assert_array_equal(picture[45 * scale, 50 * scale], (255, 255, 255))
    assert not picture[36 * scale, 20 * scale].any()
    written = lines(phrases=phrases, questions=questions)
    assert '1: "a small mass"' in written
    assert "Q: Is there a mass? A: yes" in written


def _colours_of(picture: Image.Image) -> list[tuple[int, int, int]]:
    pixels = {colour for _, colour in picture.getcolors(1 << 16) or []}
    return [colour for colour in _BOX_COLOURS if colour in pixels]


def test_a_label_of_several_lines_is_written_in_one() -> None:
    """As a quoted cell of a table may hold it."""
    heart = {"label": "heart\nborder", "x": 1, "y": 2, "width": 3, "height": 4}
    image = encode_jpeg(np.zeros((8, 8), np.uint8))
    assert _cell("0-0", image, metadata(anatomy=[heart]), {}, FONT).width == _CELL

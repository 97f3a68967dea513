"""A contact sheet: some samples of a dataset with their boxes, labels and text on one picture, for people."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.images import decode_image
from shards.reader import ShardReader

_CELL = 320
_MARGIN = 10
_GAP = 4
_MOST_LINES = 18
_FONT_SIZE = 12
_LINE = 15
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_BACKGROUND = (255, 255, 255)
_INK = (20, 20, 20)
_LABEL_INK = (160, 30, 30)
_BOX_COLOURS = ((255, 90, 60), (70, 200, 255), (255, 210, 60), (120, 255, 120), (255, 120, 255))


def contact_sheet(reader: ShardReader, split: str, samples: int, columns: int, seed: int) -> Image.Image:
    """Draw `samples` randomly chosen samples of `split`, `columns` in a row.

    Each cell shows the image with its boxes and, below, key, view, findings that are present ("?" marks
    uncertain ones) and as much of the report, by sections, as fits. The same seed chooses the same samples.

    Raises:
        DataError: the dataset has no such split, or a sample cannot be read.
    """
    total = reader.sample_count(split)
    chosen = sorted(random.Random(seed).sample(range(total), min(samples, total)))
    columns = min(columns, len(chosen))
    font = ImageFont.load_default(_FONT_SIZE)
    cells = [_cell(*reader.read(split, i), font) for i in chosen]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + _MARGIN for row in rows]
    size = (columns * (_CELL + _MARGIN) + _MARGIN, sum(heights) + _MARGIN)
    sheet = Image.new("RGB", size, _BACKGROUND)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (_MARGIN + column * (_CELL + _MARGIN), top))
        top += height
    return sheet


def _cell(key: str, image: bytes, metadata: dict[str, Any], font: Font) -> Image.Image:
    """One sample: the image with its boxes, and its text below."""
    picture = _picture(decode_image(image), metadata["boxes"], _colours(metadata["boxes"]), font)
    lines = _lines(ImageDraw.Draw(picture), key, metadata, font)
    cell = Image.new("RGB", (_CELL, _CELL + _GAP + len(lines) * _LINE), _BACKGROUND)
    cell.paste(picture, (0, 0))
    draw = ImageDraw.Draw(cell)
    for number, (line, ink) in enumerate(lines):
        draw.text((0, _CELL + _GAP + number * _LINE), line, fill=ink, font=font)
    return cell


def _picture(
    image: np.ndarray[Any, np.dtype[np.uint8]],
    boxes: list[dict[str, Any]],
    colours: dict[str, tuple[int, int, int]],
    font: Font,
) -> Image.Image:
    """The image at cell size with its boxes and, above them, their labels, none of which hides another."""
    picture = Image.fromarray(image).convert("RGB").resize((_CELL, _CELL), Image.Resampling.BICUBIC)
    scale = _CELL / image.shape[0]
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        left, top = box["x"] * scale, box["y"] * scale
        right, bottom = left + box["width"] * scale, top + box["height"] * scale
        draw.rectangle((left, top, right, bottom), outline=colours[box["label"]], width=2)
    taken: list[tuple[float, float, float]] = []
    for box in sorted(boxes, key=lambda box: (box["y"], box["x"])):
        label = box["label"]
        length = draw.textlength(label, font=font)
        left = max(0.0, min(box["x"] * scale + 3, _CELL - length))
        top = max(0.0, box["y"] * scale - _LINE)
        while any(abs(top - y) < _LINE and left < end and start < left + length for start, end, y in taken):
            top += _LINE
        taken.append((left, left + length, top))
        draw.text((left, top), label, fill=colours[label], font=font, stroke_width=2, stroke_fill=_INK)
    return picture


def _lines(
    draw: ImageDraw.ImageDraw, key: str, metadata: dict[str, Any], font: Font
) -> list[tuple[str, tuple[int, int, int]]]:
    """The text of a cell as lines with their colours; what does not fit ends in "..."."""
    marks = {1: "", -1: "?"}
    labels = [name + marks[value] for name, value in metadata["labels"].items() if value in marks]
    known = any(value is not None for value in metadata["labels"].values())
    blocks = [
        (f"{key}  {metadata['view']}  {metadata['license']}".rstrip(), _INK),
        (", ".join(labels) or ("no label present" if known else "not labelled"), _LABEL_INK),
        *((f"{name.upper()}: {text}", _INK) for name, text in metadata["sections"].items()),
    ]
    lines = [(line, ink) for text, ink in blocks for line in _wrap(draw, text, font)]
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], ("...", _INK)]


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font) -> list[str]:
    """Break text into lines of the cell's width in pixels; a word wider than that is cut."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".lstrip()
        if draw.textlength(candidate, font=font) <= _CELL:
            lines[-1] = candidate
            continue
        while draw.textlength(word, font=font) > _CELL:
            word = word[:-1]
        lines.append(word)
    return [line for line in lines if line]


def _colours(boxes: list[dict[str, Any]]) -> dict[str, tuple[int, int, int]]:
    labels = sorted({box["label"] for box in boxes})
    return {label: _BOX_COLOURS[number % len(_BOX_COLOURS)] for number, label in enumerate(labels)}

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
_TEXT_HEIGHT = 210
_FONT_SIZE = 12
_LINE = 15
_BACKGROUND = (255, 255, 255)
_INK = (20, 20, 20)
_LABEL_INK = (160, 30, 30)
_BOX_COLOURS = ((255, 90, 60), (70, 200, 255), (255, 210, 60), (120, 255, 120), (255, 120, 255))


def contact_sheet(reader: ShardReader, split: str, samples: int, columns: int, seed: int) -> Image.Image:
    """Draw `samples` randomly chosen samples of `split`, `columns` in a row.

    Each cell shows the image with its boxes and, below, key, view, findings that are present ("?" marks
    uncertain ones) and as much of the text as fits. The same seed chooses the same samples.

    Raises:
        DataError: the dataset has no such split, or a sample cannot be read.
    """
    total = reader.sample_count(split)
    chosen = sorted(random.Random(seed).sample(range(total), min(samples, total)))
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    width, height = _CELL + _MARGIN, _CELL + _TEXT_HEIGHT + _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _BACKGROUND)
    font = ImageFont.load_default(_FONT_SIZE)
    for place, i in enumerate(chosen):
        left = _MARGIN + place % columns * width
        top = _MARGIN + place // columns * height
        key, image, metadata = reader.read(split, i)
        colours = _colours(metadata["boxes"])
        sheet.paste(_picture(decode_image(image), metadata["boxes"], colours, font), (left, top))
        _write_text(ImageDraw.Draw(sheet), key, metadata, left, top + _CELL + 4, font)
    return sheet


def _picture(
    image: np.ndarray[Any, np.dtype[np.uint8]],
    boxes: list[dict[str, Any]],
    colours: dict[str, tuple[int, int, int]],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> Image.Image:
    """The image at cell size with its boxes and their labels."""
    picture = Image.fromarray(image).convert("RGB").resize((_CELL, _CELL), Image.Resampling.BICUBIC)
    scale = _CELL / image.shape[0]
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        left, top = box["x"] * scale, box["y"] * scale
        right, bottom = left + box["width"] * scale, top + box["height"] * scale
        label, colour = box["label"], colours[box["label"]]
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        corner = (max(0.0, min(left + 3, _CELL - draw.textlength(label, font=font))), max(0.0, top - _LINE))
        draw.text(corner, label, fill=colour, font=font, stroke_width=2, stroke_fill=_INK)
    return picture


def _write_text(
    draw: ImageDraw.ImageDraw,
    key: str,
    metadata: dict[str, Any],
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    marks = {1: "", -1: "?"}
    labels = [name + marks[value] for name, value in metadata["labels"].items() if value in marks]
    blocks = [
        (f"{key}  {metadata['view']}  {metadata['license']}".rstrip(), _INK),
        (", ".join(labels) or "no finding", _LABEL_INK),
        (" ".join(metadata["sentences"]), _INK),
    ]
    lines = [(line, ink) for text, ink in blocks for line in _wrap(draw, text, font)]
    room = _TEXT_HEIGHT // _LINE
    if len(lines) > room:
        lines = [*lines[: room - 1], ("...", _INK)]
    for number, (line, ink) in enumerate(lines):
        draw.text((left, top + number * _LINE), line, fill=ink, font=font)


def _wrap(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
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

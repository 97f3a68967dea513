"""A contact sheet: some samples of a dataset with boxes, masks, labels and text on a picture, for people."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shards.images import decode_image
from shards.reader import ShardReader

_CELL = 320
_MARGIN = 10
_GAP = 4
_MOST_LINES = 36
_FONT_SIZE = 12
_LINE = 15
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]
Masks = Mapping[str, NDArray[np.uint8]]

_BACKGROUND = (255, 255, 255)
_INK = (20, 20, 20)
_LABEL_INK = (160, 30, 30)
_ANATOMY = (190, 190, 190)
_PHRASE = (255, 255, 255)
#: How much of a mask's colour covers the image inside it.
_COVER = 0.25
_BOX_COLOURS = ((255, 90, 60), (70, 200, 255), (255, 210, 60), (120, 255, 120), (255, 120, 255))


def contact_sheet(reader: ShardReader, split: str, samples: int, columns: int, seed: int) -> Image.Image:
    """Draw `samples` randomly chosen samples of `split`, `columns` in a row.

    Each cell shows the image with its masks, boxes, boxes of anatomy (gray) and places of phrases (white,
    with the phrase's number) and, below, key, view, findings that are present ("?" marks uncertain ones) and
    as much of the report, by sections, of the phrases and of the questions as fits. The same seed chooses the
    same samples.

    Raises:
        DataError: the dataset has no such split, or a sample cannot be read.
    """
    total = reader.sample_count(split)
    chosen = sorted(random.Random(seed).sample(range(total), min(samples, total)))
    columns = min(columns, len(chosen))
    font = ImageFont.load_default(_FONT_SIZE)
    cells = [_cell(*reader.read(split, i), reader.masks(split, i), font) for i in chosen]
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


def _cell(key: str, image: bytes, metadata: dict[str, Any], masks: Masks, font: Font) -> Image.Image:
    """One sample: the image with its boxes and masks, and its text below."""
    picture = _picture(decode_image(image), metadata, masks, font)
    lines = _lines(ImageDraw.Draw(picture), key, metadata, font)
    cell = Image.new("RGB", (_CELL, _CELL + _GAP + len(lines) * _LINE), _BACKGROUND)
    cell.paste(picture, (0, 0))
    draw = ImageDraw.Draw(cell)
    for number, (line, ink) in enumerate(lines):
        draw.text((0, _CELL + _GAP + number * _LINE), line, fill=ink, font=font)
    return cell


def _picture(image: NDArray[np.uint8], metadata: dict[str, Any], masks: Masks, font: Font) -> Image.Image:
    """The image at cell size with everything that has a place in it, and the labels of boxes and masks."""
    picture = Image.fromarray(image).convert("RGB").resize((_CELL, _CELL), Image.Resampling.BICUBIC)
    scale = _CELL / image.shape[0]
    shown = {name: mask for name, mask in masks.items() if mask.any()}
    colours = _colours({box["label"] for box in metadata["boxes"]} | shown.keys())
    picture = _with_masks(picture, shown, colours)
    draw = ImageDraw.Draw(picture)
    for box in metadata["anatomy"]:
        draw.rectangle(_corners(box, scale), outline=_ANATOMY)
    for number, phrase in enumerate(metadata["phrases"], start=1):
        for box in phrase["boxes"]:
            _, _, right, bottom = _corners(box, scale)
            draw.rectangle(_corners(box, scale), outline=_PHRASE)
            place = (right - draw.textlength(f"{number}", font=font) - 2, bottom - _LINE)
            draw.text(place, f"{number}", fill=_PHRASE, font=font, stroke_width=2, stroke_fill=_INK)
    for box in metadata["boxes"]:
        draw.rectangle(_corners(box, scale), outline=colours[box["label"]], width=2)
    boxed = {box["label"] for box in metadata["boxes"]}
    named = [(box, colours[box["label"]]) for box in metadata["boxes"]]
    named += [(_around(name, mask), colours[name]) for name, mask in shown.items() if name not in boxed]
    named += [(box, _ANATOMY) for box in metadata["anatomy"]]
    _write_labels(draw, named, scale, font)
    return picture


def _with_masks(picture: Image.Image, masks: Masks, colours: Mapping[str, Colour]) -> Image.Image:
    """Masks as translucent areas with outlines."""
    pixels = np.array(picture)
    for name, mask in masks.items():
        large = cv2.resize(mask, (_CELL, _CELL), interpolation=cv2.INTER_NEAREST)
        inside, colour = large > 0, np.array(colours[name])
        pixels[inside] = np.rint((1 - _COVER) * pixels[inside] + _COVER * colour)
        outlines, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outlines, -1, colours[name], 1)
    return Image.fromarray(pixels)


def _write_labels(
    draw: ImageDraw.ImageDraw, named: list[tuple[dict[str, Any], Colour]], scale: float, font: Font
) -> None:
    """Labels above what they name, none of which hides another."""
    taken: list[tuple[float, float, float]] = []
    for box, colour in sorted(named, key=lambda item: (item[0]["y"], item[0]["x"])):
        label = " ".join(box["label"].split())  # a line break has no length
        length = draw.textlength(label, font=font)
        left = max(0.0, min(box["x"] * scale + 3, _CELL - length))
        top = max(0.0, box["y"] * scale - _LINE)
        while any(abs(top - y) < _LINE and left < end and start < left + length for start, end, y in taken):
            top += _LINE
        taken.append((left, left + length, top))
        draw.text((left, top), label, fill=colour, font=font, stroke_width=2, stroke_fill=_INK)


def _corners(box: dict[str, Any], scale: float) -> tuple[float, float, float, float]:
    left, top = box["x"] * scale, box["y"] * scale
    return left, top, left + box["width"] * scale, top + box["height"] * scale


def _around(name: str, mask: NDArray[np.uint8]) -> dict[str, Any]:
    x, y, width, height = cv2.boundingRect(mask)
    return {"label": name, "x": x, "y": y, "width": width, "height": height}


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
        *((f'{n}: "{phrase["text"]}"', _INK) for n, phrase in enumerate(metadata["phrases"], start=1)),
        *((f"Q: {item['question']} A: {item['answer']}", _INK) for item in metadata["questions"]),
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


def _colours(labels: Collection[str]) -> dict[str, Colour]:
    return {label: _BOX_COLOURS[number % len(_BOX_COLOURS)] for number, label in enumerate(sorted(labels))}

"""Pictures of examples: what a network drew over an image, and what is true."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from medvlp.data.transforms import evaluation_view
from medvlp.evaluation.examples import Box, BoxExample

Pixels = NDArray[np.uint8]

#: Red, green and blue of what is true and of what a network says; both stand out from gray, also for people
#: who see few colours (Okabe and Ito).
TRUE, SAID = (86, 180, 233), (230, 159, 0)
_COVER = 0.35
#: Found boxes that are drawn where fewer are true.
_FEWEST = 3


def seen_image(image: Pixels, side: int, crop: str, shown: int) -> Pixels:
    """A stored image [H, W] as a network sees it, [shown, shown].

    Args:
        side, crop: of `Examples`.
    """
    view, _ = evaluation_view(image, side, crop)
    return _resized(view, shown)


def mask_picture(image: Pixels, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Pixels:
    """[S, S, 3] of an image [S, S]: tinted inside the mask, with its outline.

    Args:
        mask: of any size, of the whole image.
    """
    inside = _resized(mask.astype(np.uint8) * 255, image.shape[0]) > 127
    picture = np.repeat(image[:, :, None], 3, axis=2).astype(np.float32)
    picture[inside] = (1 - _COVER) * picture[inside] + _COVER * np.array(colour, dtype=np.float32)
    drawn = np.ascontiguousarray(picture.astype(np.uint8))
    outline, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, outline, -1, colour, 1)
    return drawn


def drawn_boxes(example: BoxExample) -> Sequence[Box]:
    """The found boxes that `box_picture` draws: the most certain, as many as are true, at least `_FEWEST`."""
    return example.found[: max(_FEWEST, len(example.truth))]


def box_picture(image: Pixels, example: BoxExample, side: int) -> Pixels:
    """[S, S, 3] of an image [S, S]: true boxes in solid lines with letters, found ones in broken lines with
    numbers (`letter` and 1, 2, ... in the order of the example).

    Args:
        side: of the image that the boxes are of.
    """
    picture = np.ascontiguousarray(np.repeat(image[:, :, None], 3, axis=2))
    scale = image.shape[0] / side
    for number, box in enumerate(example.truth):
        left, top, right, bottom = _corners(box, scale)
        cv2.rectangle(picture, (left, top), (right, bottom), TRUE, 2)
        _write(picture, letter(number), right - 11, bottom - 4, TRUE)
    for number, box in enumerate(drawn_boxes(example), start=1):
        left, top, right, bottom = _corners(box, scale)
        for begin, end in (
            ((left, top), (right, top)), ((right, top), (right, bottom)),
            ((right, bottom), (left, bottom)), ((left, bottom), (left, top)),
        ):  # fmt: skip
            _broken_line(picture, begin, end)
        _write(picture, str(number), left + 3, top + 12, SAID)
    return picture


def letter(number: int) -> str:
    """The letter of a true box: a, b, ..., and its number from 27 on."""
    return chr(ord("a") + number) if number < 26 else str(number + 1)


def _write(picture: Pixels, text: str, left: int, bottom: int, colour: tuple[int, int, int]) -> None:
    place = (max(left, 1), min(max(bottom, 12), picture.shape[0] - 3))
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)


def _broken_line(picture: Pixels, begin: tuple[int, int], end: tuple[int, int], dash: int = 5) -> None:
    length = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]))
    points = [
        np.array(begin) + (np.array(end) - begin) * share
        for share in np.arange(0, 1, dash / max(length, dash))
    ]
    for first, second in zip(points[::2], [*points[1::2], np.array(end)], strict=False):
        cv2.line(picture, first.round().astype(int).tolist(), second.round().astype(int).tolist(), SAID, 1)


def _corners(box: Box, scale: float) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(place * scale) for place in (box.left, box.top, box.right, box.bottom))
    return left, top, right, bottom


def _resized(image: Pixels, side: int) -> Pixels:
    shrinks = side < image.shape[0]
    resized = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)

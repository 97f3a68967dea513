"""A few samples of the evaluated split with what the trained network made of them, for people to look at.

They are chosen by what is true of them, before anybody looks at what the network says: what a page shows of
a network is then as good and as bad as the network is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shards.masks import encode_runs

#: Most examples of a unit: of what is there, and of what is known not to be there.
MOST, MOST_ABSENT = 6, 2
#: Most boxes that an example keeps of those a network has found, the most certain ones.
MOST_FOUND = 10


@dataclass(frozen=True)
class MaskExample:
    """The mask of one finding in one image.

    Attributes:
        sample: position in the split. finding: what is drawn.
        predicted, truth: run lengths (`shards.masks.encode_runs`, absolute, down the columns).
    """

    sample: int
    finding: str
    predicted: str
    truth: str


@dataclass(frozen=True)
class Box:
    """A box in pixels of the image that the network sees; score: how certain the network is of it."""

    finding: str
    left: float
    top: float
    right: float
    bottom: float
    score: float | None = None


@dataclass(frozen=True)
class BoxExample:
    """The boxes of one image: found by the network, most certain first, and true ones."""

    sample: int
    found: list[Box]
    truth: list[Box]


@dataclass(frozen=True)
class TextExample:
    """A generated report and the true one, as they are compared."""

    sample: int
    generated: str
    reference: str


@dataclass(frozen=True)
class Examples:
    """Of one unit.

    Attributes:
        chosen: how the samples were chosen, a sentence for people.
        side: of the images that the network sees, in pixels; 0 where no places are told.
        crop: how it sees a stored image (`medvlp.data.transforms.evaluation_view`).
        masks, boxes, texts: the examples, of one of these kinds.
    """

    chosen: str
    side: int = 0
    crop: str = "none"
    masks: list[MaskExample] = field(default_factory=list)
    boxes: list[BoxExample] = field(default_factory=list)
    texts: list[TextExample] = field(default_factory=list)


def by_finding(shows: NDArray[np.bool_], most: int) -> list[tuple[int, int]]:
    """(row, column) of samples that show a finding: the first of each finding, then the second of each, ...

    Args:
        shows: [N, C]. most: of all together; no sample is taken twice.
    """
    taken: dict[int, int] = {}
    waiting = [np.flatnonzero(column).tolist() for column in shows.T]
    while len(taken) < most and any(waiting):
        for column, rows in enumerate(waiting):
            while rows and rows[0] in taken:
                rows.pop(0)
            if rows and len(taken) < most:
                taken[rows.pop(0)] = column
    return list(taken.items())


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()})


def mask_example(
    sample: int, finding: str, predicted: NDArray[np.bool_], truth: NDArray[np.bool_]
) -> MaskExample:
    """Of masks [S, S] as they are."""
    runs = (encode_runs(mask.astype(np.uint8), "absolute") for mask in (predicted, truth))
    return MaskExample(int(sample), finding, *runs)


def found_boxes(names: Sequence[str], rows: NDArray[np.floating], side: int) -> list[Box]:
    """The `MOST_FOUND` most certain of boxes [n, 6]: left, top, right, bottom, class, score.

    Args:
        names: of the classes; rows of another class (-1) are no boxes.
        side: of the image, beyond which no box is told to reach.
    """
    rows = rows[rows[:, 4] >= 0].astype(np.float64)
    order = np.argsort(-rows[:, 5], kind="stable")[:MOST_FOUND]
    return [Box(*_box(names, row, side), round(float(row[5]), 4)) for row in rows[order]]


def true_boxes(names: Sequence[str], rows: NDArray[np.floating], side: int) -> list[Box]:
    """Boxes [n, 6] of left, top, right, bottom, class and whether they are hedged: those that are certain."""
    certain = rows[(rows[:, 4] >= 0) & (rows[:, 5] == 0)]
    return [Box(*_box(names, row, side)) for row in certain]


def _box(
    names: Sequence[str], row: NDArray[np.floating], side: int
) -> tuple[str, float, float, float, float]:
    left, top, right, bottom = row[:4].astype(np.float64).clip(0, side).round(2).tolist()
    return names[int(row[4])], left, top, right, bottom

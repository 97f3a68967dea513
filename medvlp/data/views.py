"""Which part of a stored image is seen, and where its places come to lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Coordinates = NDArray[np.float64]


class Reduced(NamedTuple):
    """How a stored image was decoded smaller: `shape` [H, W] of what is stored, sides by `factor`."""

    shape: tuple[int, int]
    factor: int


@dataclass(frozen=True)
class View:
    """Which part of a stored image a sample shows, so that what lies in the image can move with it.

    Attributes:
        left, top, width, height: the part, in pixels of the stored image.
        size: side of the view in pixels.
        flipped: left and right are exchanged.
    """

    left: float
    top: float
    width: float
    height: float
    size: int
    flipped: bool = False

    def horizontal(self, left: Coordinates, right: Coordinates) -> tuple[Coordinates, Coordinates]:
        """Horizontal intervals of the stored image in pixels of the view, the smaller ends first."""
        left, right = ((x - self.left) * (self.size / self.width) for x in (left, right))
        return (self.size - right, self.size - left) if self.flipped else (left, right)

    def vertical(self, top: Coordinates, bottom: Coordinates) -> tuple[Coordinates, Coordinates]:
        """Vertical intervals of the stored image in pixels of the view."""
        scale = self.size / self.height
        return (top - self.top) * scale, (bottom - self.top) * scale

    def stored_columns(self) -> NDArray[np.int64]:
        """[size] the column of the stored image under the middle of each column of the view."""
        columns = _under(self.left, self.width, self.size)
        return columns[::-1] if self.flipped else columns

    def stored_rows(self) -> NDArray[np.int64]:
        """[size] the row of the stored image under the middle of each row of the view."""
        return _under(self.top, self.height, self.size)


def _under(start: float, length: float, size: int) -> NDArray[np.int64]:
    middles = start + (np.arange(size) + 0.5) * (length / size)
    positions: NDArray[np.int64] = np.floor(middles).astype(np.int64)
    return positions

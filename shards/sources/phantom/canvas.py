"""Drawing in body coordinates: anti-aliased polygons, strokes, soft blurs and noise fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Points = NDArray[np.float64]

_SHIFT = 4  # OpenCV takes sub-pixel coordinates as integers with this many fractional bits


@dataclass(frozen=True)
class Frame:
    """Affine map from body coordinates to the pixels of a square canvas.

    Body coordinates: x in about [-1, 1] from the patient's right (image left) to the left, y in about
    [-1, 1] from the neck downwards.
    """

    size: int
    matrix: NDArray[np.float64]
    unit: float

    @classmethod
    def posed(cls, size: int, scale: float, angle: float, shear: float, shift: tuple[float, float]) -> Frame:
        """A canvas of `size` pixels; `angle` in radians, `shift` in body units."""
        unit = 0.5 * size * scale
        cosine, sine = np.cos(angle), np.sin(angle)
        linear = unit * np.array([[cosine, -sine + shear], [sine, cosine]])
        offset = 0.5 * size * (1.0 + np.array(shift))
        return cls(size, np.column_stack([linear, offset]), unit)

    def pixels(self, points: Points) -> Points:
        """[n, 2] body coordinates -> [n, 2] canvas pixels."""
        return np.asarray(points @ self.matrix[:, :2].T + self.matrix[:, 2])

    def blank(self) -> NDArray[np.uint8]:
        """An empty 8-bit canvas to stroke on."""
        return np.zeros((self.size, self.size), np.uint8)

    def fill(self, *polygons: Points) -> Image:
        """Coverage in [0, 1] of closed polygons."""
        canvas = self.blank()
        for polygon in polygons:
            cv2.fillPoly(canvas, [self._fixed(polygon)], (255,), cv2.LINE_AA, _SHIFT)
        return as_float(canvas)

    def stroke(self, canvas: NDArray[np.uint8], line: Points, width: float, value: float = 1.0) -> None:
        """Draw a polyline of `width` body units; thinner than a pixel becomes fainter instead."""
        self.strokes(canvas, [line], width, value)

    def strokes(
        self, canvas: NDArray[np.uint8], lines: Sequence[Points], width: float, value: float = 1.0
    ) -> None:
        """`stroke` for many polylines in one call."""
        pixels = width * self.unit
        thickness = max(1, round(pixels))
        level = round(255.0 * value * min(1.0, pixels))
        fixed = [self._fixed(line) for line in lines]
        cv2.polylines(canvas, fixed, False, (level,), thickness, cv2.LINE_AA, _SHIFT)

    def line(self, line: Points, width: float) -> Image:
        """Coverage in [0, 1] of one stroked polyline."""
        canvas = self.blank()
        self.stroke(canvas, line, width)
        return as_float(canvas)

    def blur(self, image: Image, sigma: float) -> Image:
        """Gaussian blur of `sigma` body units; wide ones run on a reduced image, where they cost nothing."""
        pixels = sigma * self.unit
        step = int(max(1, min(pixels // 1.5, self.size // 16)))
        if step == 1:
            return np.asarray(cv2.GaussianBlur(image, (0, 0), max(pixels, 0.1)), np.float32)
        side = self.size // step
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), pixels / step)
        return np.asarray(
            cv2.resize(small, (self.size, self.size), interpolation=cv2.INTER_CUBIC), np.float32
        )

    def noise(self, rng: np.random.Generator, grain: float) -> Image:
        """Smooth standard-normal field whose grains are `grain` body units wide."""
        cells = max(2, round(self.size / (grain * self.unit)))
        field = rng.standard_normal((cells, cells), np.float32)
        size = (self.size, self.size)
        return np.asarray(cv2.resize(field, size, interpolation=cv2.INTER_CUBIC), np.float32)

    def _fixed(self, points: Points) -> NDArray[np.int32]:
        return np.round(self.pixels(points) * (1 << _SHIFT)).astype(np.int32)


def as_float(canvas: NDArray[np.uint8]) -> Image:
    """8-bit coverage -> float32 in [0, 1]."""
    return canvas.astype(np.float32) * np.float32(1.0 / 255.0)


def ellipse(centre: Points, width: float, height: float) -> Points:
    """A closed ellipse with half axes `width` and `height`; its last point is its first."""
    angle = np.linspace(0.0, 2.0 * np.pi, 25)
    return centre + np.column_stack([width * np.cos(angle), height * np.sin(angle)])


def smooth(points: Points, closed: bool = False, rounds: int = 2) -> Points:
    """Chaikin's corner cutting; an open curve keeps its ends."""
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0) if closed else points[1:]
        before = points if closed else points[:-1]
        cut = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], axis=1).reshape(-1, 2)
        points = cut if closed else np.vstack([points[:1], cut, points[-1:]])
    return points


def blob(
    rng: np.random.Generator, centre: Points, radius: float, roughness: float, stretch: float = 1.0
) -> Points:
    """A closed irregular outline: an ellipse at a random angle with a few random harmonics."""
    angle = np.linspace(0.0, 2.0 * np.pi, 40, endpoint=False)
    bumps = np.zeros_like(angle)
    for harmonic in range(2, 7):
        bumps += rng.normal(0.0, roughness / harmonic**0.5) * np.cos(
            harmonic * angle + rng.uniform(0, 2 * np.pi)
        )
    reach = radius * np.clip(1.0 + bumps, 0.4, 1.8)
    shape = np.column_stack([reach * np.cos(angle) * stretch, reach * np.sin(angle) / stretch])
    turn = rng.uniform(0, np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.asarray(centre + shape @ rotation.T)

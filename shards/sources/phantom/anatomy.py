"""The body of a phantom patient: proportions, and the outlines of lungs, heart, ribs and clavicles.

All curves are in body coordinates (see `canvas.Frame`). `sign` is +1 for the patient's left (image right)
and -1 for the right. Inside a lung, a point is (u, v): u from mediastinum (0) to chest wall (1), v from
apex (0) to diaphragm (1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.sources.phantom.canvas import Points, smooth

SIGNS = {"left": 1.0, "right": -1.0}
RIBS = 9
ORDINALS = ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass(frozen=True)
class Anatomy:
    """Proportions of one patient in body units; constant over the patient's studies."""

    half_width: float
    apex: float
    angle: float  # y of the costophrenic angles
    dome_right: float
    dome_left: float
    heart_ratio: float
    heart_drop: float
    spine: float
    rib_width: float
    rib_slope: float
    clavicle_tilt: float
    shoulder: float
    breast: float  # 0 for none
    fat: float
    vessels: int
    marking_seed: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Anatomy:
        """Draw a patient."""
        dome = rng.uniform(0.14, 0.28)
        return cls(
            half_width=rng.uniform(0.62, 0.80),
            apex=rng.uniform(-0.80, -0.62),
            angle=rng.uniform(0.50, 0.74),
            dome_right=dome + rng.uniform(0.0, 0.08),
            dome_left=dome + rng.uniform(-0.05, 0.03),
            heart_ratio=rng.uniform(0.40, 0.49),
            heart_drop=rng.uniform(-0.05, 0.05),
            spine=rng.uniform(0.085, 0.115),
            rib_width=rng.uniform(0.045, 0.062),
            rib_slope=rng.uniform(0.18, 0.34),
            clavicle_tilt=rng.uniform(-0.05, 0.16),
            shoulder=rng.uniform(0.9, 1.15),
            breast=float(rng.random() < 0.5) * rng.uniform(0.3, 1.0),
            fat=rng.uniform(0.10, 0.28),
            vessels=int(rng.integers(8, 15)),
            marking_seed=int(rng.integers(2**63)),
        )

    def wall(self, y: ArrayLike) -> NDArray[np.float64]:
        """|x| of the inner chest wall at height y."""
        t = np.clip((np.asarray(y, float) - self.apex) / (self.angle - self.apex), 0.0, 1.1)
        rise = 1.0 - np.abs(1.0 - np.minimum(t / 0.6, 1.0)) ** 2.3
        return self.half_width * (0.38 + 0.62 * rise - 0.05 * np.maximum(t - 0.7, 0.0))

    def hilum(self, y: ArrayLike) -> NDArray[np.float64]:
        """|x| of the mediastinal border of the lung at height y (the heart lies over it)."""
        t = (np.asarray(y, float) - self.apex) / (self.angle - self.apex)
        return 0.125 + 0.04 * np.exp(-((t - 0.35) ** 2) / 0.02) - 0.01 * t

    def lung(self, side: str, u: ArrayLike, v: ArrayLike) -> Points:
        """(u, v) of the lung on `side` -> [n, 2] body coordinates."""
        u, v = np.broadcast_arrays(np.asarray(u, float), np.asarray(v, float))
        height = self.dome_left if side == "left" else self.dome_right
        slope = np.where(u > 0.42, (u - 0.42) / 0.58, 0.5 * (0.42 - u) / 0.42)
        dome = self.angle - height * (1.0 - slope**2)
        top = self.apex - 0.05 * np.sin(np.pi * np.clip(u, 0, 1))
        y = top + v * (dome - top)
        inner = self.hilum(y)
        x = inner + u * (self.wall(y) - inner)
        return np.column_stack([np.ravel(SIGNS[side] * x), np.ravel(y)])

    def lung_outline(self, side: str) -> Points:
        """Closed outline of a lung down to the diaphragm."""
        run = np.linspace(0.0, 1.0, 14)
        back = run[::-1]
        edges = [
            self.lung(side, run, 0.0),
            self.lung(side, 1.0, run[1:]),
            self.lung(side, back[1:], 1.0),
            self.lung(side, 0.0, back[1:-1]),
        ]
        return smooth(np.vstack(edges), closed=True)

    def heart_outline(self) -> Points:
        """Closed outline of the heart; its width is `heart_ratio` of the inner chest."""
        width = 2.0 * self.half_width * self.heart_ratio
        left, right = 0.68 * width, 0.32 * width
        bottom = self.angle - 0.10 + self.heart_drop
        top = bottom - 0.62 * (0.75 + 0.5 * self.heart_ratio)
        points = np.array(
            [
                [-0.10, top - 0.20],
                [0.12, top - 0.20],
                [0.17, top - 0.02],
                [0.55 * left, top + 0.20],
                [1.06 * left, bottom - 0.22],
                [0.98 * left, bottom],
                [0.2 * left, bottom + 0.08],
                [-0.9 * right, bottom + 0.02],
                [-1.08 * right, bottom - 0.20],
                [-0.75 * right, top + 0.12],
                [-0.11, top],
            ]
        )
        return smooth(points, closed=True, rounds=3)

    def rib(self, side: str, number: int, front: bool = False) -> Points:
        """Centre line of a rib from the spine to the chest wall (`front`: back towards the sternum)."""
        spacing = (self.angle - self.apex) / (RIBS - 0.5)
        start = self.apex - 0.02 + spacing * number
        s = np.linspace(0.0, 1.0, 16)
        if front:
            y = start + self.rib_slope + 0.32 * s**1.4
            outer = self.wall(y[:1])[0]
            x = outer - s**1.3 * (outer - 0.26)
        else:
            y = start - 0.10 * np.sin(np.pi * s * 0.7) + (0.08 + self.rib_slope) * s**2.2
            outer = float(self.wall(y[-1:])[0]) + 0.02
            x = 0.07 + (outer - 0.07) * np.sin(0.42 * np.pi * s) / np.sin(0.42 * np.pi)
        return np.column_stack([SIGNS[side] * x, y])

    def clavicle(self, side: str) -> Points:
        """Centre line of a clavicle from the sternum to the shoulder."""
        s = np.linspace(0.0, 1.0, 12)
        x = 0.06 + 0.62 * s * self.shoulder
        y = self.apex + 0.20 - self.clavicle_tilt * s - 0.05 * np.sin(2 * np.pi * s)
        return np.column_stack([SIGNS[side] * x, y])

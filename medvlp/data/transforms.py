"""Crops and intensity changes on uint8 images, random by (seed, epoch, sample) alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from medvlp.config import TransformConfig

Image = NDArray[np.uint8]
Coordinates = NDArray[np.float64]

#: Uniform numbers one sample draws: crop side, crop top, crop left, flip, brightness, contrast.
DRAWS = 6


class SampleRandom:
    """Uniform numbers that depend on nothing but (seed, epoch, sample): Philox with key (seed, epoch) and the
    sample as its counter."""

    def __init__(self, seed: int, epoch: int) -> None:
        self._generator = np.random.Philox(key=(seed & ((1 << 64) - 1)) | (epoch << 64))
        self._state = self._generator.state

    def words(self, sample: int, count: int) -> NDArray[np.uint64]:
        """`count` uniform 64-bit words of this sample."""
        # Setting the counter of one generator is seven times faster than building one for each sample.
        self._state["state"]["counter"][3] = sample
        self._generator.state = self._state
        return self._generator.random_raw(count)

    def uniform(self, sample: int, count: int) -> list[float]:
        """`count` numbers in [0, 1) of this sample, with the 53 bits of a double."""
        values: list[float] = ((self.words(sample, count) >> np.uint64(11)) * 2.0**-53).tolist()
        return values


def resize(image: Image, size: int) -> Image:
    """Resize to [size, size]: area averaging where it shrinks, bilinear where it grows."""
    if image.shape == (size, size):
        return image
    shrinks = image.shape[0] > size or image.shape[1] > size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (size, size), interpolation=interpolation), dtype=np.uint8)


def evaluation_view(image: Image, size: int, crop: str) -> tuple[Image, View]:
    """The deterministic view of an image [H, W]: its [size, size] center, or all of it.

    With `crop` "none" (as in training) or a stored image smaller than `size` the whole image is resized.
    """
    height, width = image.shape
    if crop == "none" or height < size or width < size:
        return resize(image, size), View(0, 0, width, height, size)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size], View(left, top, size, size, size)


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


def training_view(
    image: Image, size: int, config: TransformConfig, uniform: list[float]
) -> tuple[Image, View]:
    """The augmented [size, size] view of an image [H, W].

    The crop side is uniform in [scale_min * size, size] pixels and the crop is then resized to `size`; at
    `scale_min` 1 (MGCA) it is a plain crop at a uniform place. A stored image smaller than `size` is resized
    up first.

    Args:
        image: stored pixels.
        size: side of the result.
        config: what to change, and how much.
        uniform: `DRAWS` numbers in [0, 1) of this sample.

    Returns:
        The pixels, and where they come from.
    """
    draw_side, draw_top, draw_left, draw_flip, draw_brightness, draw_contrast = uniform
    if config.crop != "random":
        image, view = evaluation_view(image, size, config.crop)
    else:
        height, width = image.shape
        if image.shape[0] < size or image.shape[1] < size:
            image = resize(image, size)
        smallest = max(1, round(config.scale_min * size))
        side = smallest + int(draw_side * (size - smallest + 1))
        top = int(draw_top * (image.shape[0] - side + 1))
        left = int(draw_left * (image.shape[1] - side + 1))
        across, down = width / image.shape[1], height / image.shape[0]  # stored pixels of a pixel here
        view = View(left * across, top * down, side * across, side * down, size)
        image = resize(image[top : top + side, left : left + side], size)
    if draw_flip < config.flip:
        image, view = image[:, ::-1], replace(view, flipped=True)
    if config.brightness > 0 or config.contrast > 0:
        brightness = 1 + config.brightness * (2 * draw_brightness - 1)
        contrast = 1 + config.contrast * (2 * draw_contrast - 1)
        image = _change_intensity(image, brightness, contrast)
    return image, view


def _change_intensity(image: Image, brightness: float, contrast: float) -> Image:
    """Stretch by `contrast` about the mean and multiply by `brightness`: one look-up, clipped once."""
    mean = float(image.mean())
    levels = np.arange(256)
    table = ((levels - mean) * contrast + mean) * brightness
    levels_out: Image = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    return levels_out[image]

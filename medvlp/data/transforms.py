"""Crops and intensity changes on uint8 images, random by (seed, epoch, sample) alone."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from medvlp.config import TransformConfig

Image = NDArray[np.uint8]

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


def evaluation_view(image: Image, size: int, crop: str) -> Image:
    """The deterministic view of an image [H, W]: its [size, size] center, or all of it.

    With `crop` "none" (as in training) or a stored image smaller than `size` the whole image is resized.
    """
    height, width = image.shape
    if crop == "none" or height < size or width < size:
        return resize(image, size)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def is_flipped(config: TransformConfig, uniform: list[float]) -> bool:
    """Whether `training_view` flips the image for these numbers."""
    return uniform[3] < config.flip


def training_view(image: Image, size: int, config: TransformConfig, uniform: list[float]) -> Image:
    """The augmented [size, size] view of an image [H, W].

    The crop side is uniform in [scale_min * size, size] pixels and the crop is then resized to `size`; at
    `scale_min` 1 (MGCA) it is a plain crop at a uniform place. A stored image smaller than `size` is resized
    up first.

    Args:
        image: stored pixels.
        size: side of the result.
        config: what to change, and how much.
        uniform: `DRAWS` numbers in [0, 1) of this sample.
    """
    draw_side, draw_top, draw_left, _, draw_brightness, draw_contrast = uniform
    if config.crop != "random":
        image = evaluation_view(image, size, config.crop)
    else:
        if image.shape[0] < size or image.shape[1] < size:
            image = resize(image, size)
        smallest = max(1, round(config.scale_min * size))
        side = smallest + int(draw_side * (size - smallest + 1))
        top = int(draw_top * (image.shape[0] - side + 1))
        left = int(draw_left * (image.shape[1] - side + 1))
        image = resize(image[top : top + side, left : left + side], size)
    if is_flipped(config, uniform):
        image = image[:, ::-1]
    if config.brightness > 0 or config.contrast > 0:
        brightness = 1 + config.brightness * (2 * draw_brightness - 1)
        contrast = 1 + config.contrast * (2 * draw_contrast - 1)
        image = _change_intensity(image, brightness, contrast)
    return image


def _change_intensity(image: Image, brightness: float, contrast: float) -> Image:
    """Stretch by `contrast` about the mean and multiply by `brightness`: one look-up, clipped once."""
    mean = float(image.mean())
    levels = np.arange(256)
    table = ((levels - mean) * contrast + mean) * brightness
    levels_out: Image = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    return levels_out[image]

"""Crops and intensity changes on uint8 images, random by (seed, epoch, sample) alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medvlp.config import TransformConfig
from medvlp.data.augment import area_view, rand_augment, resize, rotate
from medvlp.data.views import Image, Reduced
from medvlp.data.views import View as View

#: Uniform numbers one sample draws: crop side, crop top, crop left, flip, brightness, contrast.
DRAWS = 6


class SampleRandom:
    """Uniform numbers that depend on nothing but (seed, epoch, sample): Philox with key (seed, epoch) and the
    sample as its counter. Another `stream` (below 2) gives others."""

    def __init__(self, seed: int, epoch: int, stream: int = 0) -> None:
        high = epoch | (stream << 62)  # the highest bit is that of `medvlp.data.order`'s streams
        self._generator = np.random.Philox(key=(seed & ((1 << 64) - 1)) | (high << 64))
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


def evaluation_crop(config: TransformConfig) -> str:
    """The crop of evaluation, for `evaluation_view`: "center", or "none" for the whole image."""
    if config.evaluation == "auto":
        return "none" if config.crop in ("none", "area") else "center"
    return "none" if config.evaluation == "whole" else "center"


def evaluation_view(image: Image, size: int, crop: str) -> tuple[Image, View]:
    """The deterministic view of an image [H, W]: its [size, size] center, or all of it.

    With `crop` "none" (see `evaluation_crop`) or a stored image smaller than `size` the whole is resized.
    """
    height, width = image.shape
    if crop == "none" or height < size or width < size:
        return resize(image, size), View(0, 0, width, height, size)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size], View(left, top, size, size, size)


def training_view(
    image: Image,
    size: int,
    config: TransformConfig,
    uniform: list[float],
    more: list[float] | None = None,
    reduced: Reduced | None = None,
) -> tuple[Image, View]:
    """The augmented [size, size] view of an image [H, W].

    With `crop` "area" a part of the whole image (`medvlp.data.augment.area_crop`). With "random" the crop
    side is uniform in [scale_min * size, size] pixels and the crop is then resized to `size`; at `scale_min`
    1 (MGCA) it is a plain crop at a uniform place. A stored image smaller than `size` is resized up first.

    Args:
        image: stored pixels.
        size: side of the result.
        config: what to change, and how much.
        uniform: `DRAWS` numbers in [0, 1) of this sample.
        more: the numbers of `medvlp.data.augment.draws`, where it asks for some.
        reduced: how the image was decoded smaller, by `medvlp.data.augment.reduction`; None: it was not.

    Returns:
        The pixels, and where they come from (before rotation and RandAugment).
    """
    draw_side, draw_top, draw_left, draw_flip, draw_brightness, draw_contrast = uniform
    if config.crop == "area":
        assert more is not None, "asked for by augment.draws"
        image, view = area_view(image, size, config, more, reduced)
    elif config.crop != "random":
        image, view = evaluation_view(image, size, config.crop)
        if reduced is not None:  # of the whole
            view = replace(view, height=reduced.shape[0], width=reduced.shape[1])
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
        image = resize(image[top : top + side, left : left + side], size, config.interpolation)
    if more is not None and config.rotate > 0:
        image = rotate(image, config, more)
    if draw_flip < config.flip:
        image, view = image[:, ::-1], replace(view, flipped=True)
    if config.brightness > 0 or config.contrast > 0:
        brightness = 1 + config.brightness * (2 * draw_brightness - 1)
        contrast = 1 + config.contrast * (2 * draw_contrast - 1)
        image = _change_intensity(image, brightness, contrast)
    if more is not None and config.rand_augment > 0:
        image = rand_augment(image, config, more)
    return image, view


def _change_intensity(image: Image, brightness: float, contrast: float) -> Image:
    """Stretch by `contrast` about the mean and multiply by `brightness`: one look-up, clipped once."""
    mean = float(image.mean())
    levels = np.arange(256)
    table = ((levels - mean) * contrast + mean) * brightness
    levels_out: Image = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    return levels_out[image]

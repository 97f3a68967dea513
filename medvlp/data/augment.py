"""The papers' stronger changes of training images: crops by area and shape, rotation, RandAugment.

Written by hand, because torchvision and timm draw from global generators, and a sample's changes here are a
function of (seed, epoch, sample).
"""

import math

import cv2
import numpy as np
import PIL.Image

from medvlp.config import TransformConfig
from medvlp.data.views import Image, Reduced, View

#: Tries of a crop that fits, as torchvision's; each takes an area and a shape.
_TRIES = 10
#: Numbers that a crop by area, a rotation and an operation of RandAugment take.
_CROP, _ROTATION, _OPERATION = 2 * _TRIES + 2, 1, 3
#: Gray level beyond the image under RandAugment's operations.
_GRAY = 128


def draws(config: TransformConfig) -> int:
    """Uniform numbers that `area_crop`, `rotate` and `rand_augment` take of a sample; 0: none is on."""
    if not (config.crop == "area" or config.rotate > 0 or config.rand_augment > 0):
        return 0
    return _CROP + _ROTATION + _OPERATION * config.rand_augment


def moves_freely(config: TransformConfig) -> bool:
    """Whether places in the image move in a way that boxes and masks do not follow."""
    return config.rotate > 0 or config.rand_augment > 0


def area_crop(
    shape: tuple[int, int], config: TransformConfig, uniform: list[float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of a whole image of [H, W] pixels, drawn by area and shape.

    (torchvision's RandomResizedCrop: a uniform share of the area, a log-uniform ratio of width to height; of
    ten draws the first that fits, else the largest central part of an allowed ratio.)
    """
    rows, columns = shape
    bound = math.log(config.ratio_max)
    for number in range(_TRIES):
        share, ratio_draw = uniform[2 * number], uniform[2 * number + 1]
        area = rows * columns * (config.area_min + share * (config.area_max - config.area_min))
        ratio = math.exp(bound * (2 * ratio_draw - 1))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= columns and 0 < height <= rows:
            top, left = uniform[2 * _TRIES], uniform[2 * _TRIES + 1]
            return int(top * (rows - height + 1)), int(left * (columns - width + 1)), height, width
    width = min(columns, round(rows * config.ratio_max))
    height = min(rows, round(columns * config.ratio_max))
    return (rows - height) // 2, (columns - width) // 2, height, width


def reduction(shape: tuple[int, int], size: int, config: TransformConfig, uniform: list[float] | None) -> int:
    """By what a stored image of [H, W] pixels may be decoded smaller: 8, 4, 2 or 1.

    What training takes of it keeps at least `size` pixels a side, so nothing is enlarged that would not be
    otherwise. `uniform` is that of `area_crop`, which asks for it.
    """
    if config.crop == "area":
        assert uniform is not None, "asked for by draws"
        shape = area_crop(shape, config, uniform)[2:]
    elif config.crop != "none":
        return 1  # stored pixels are taken as they are
    return next((factor for factor in (8, 4, 2) if factor * size <= min(shape)), 1)


def area_view(
    image: Image,
    size: int,
    config: TransformConfig,
    uniform: list[float],
    reduced: Reduced | None = None,
) -> tuple[Image, View]:
    """The part that `area_crop` draws, at [size, size]; of an image decoded smaller, up to a pixel of it."""
    shape, factor = reduced or (image.shape, 1)
    top, left, height, width = area_crop(shape, config, uniform)
    first_row, first_column = top // factor, left // factor
    part = image[first_row : (top + height) // factor, first_column : (left + width) // factor]
    rows, columns = part.shape
    view = View(first_column * factor, first_row * factor, columns * factor, rows * factor, size)
    return resize(part, size, config.interpolation), view


def resize(image: Image, size: int, interpolation: str = "area") -> Image:
    """Resize to [size, size].

    Args:
        image: [H, W].
        size: of the result.
        interpolation: "area": averaging where it shrinks, bilinear where it grows; "bicubic": Pillow's, as
            torchvision resizes.
    """
    if image.shape == (size, size):
        return image
    if interpolation == "bicubic":
        whole = PIL.Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(whole.resize((size, size), PIL.Image.Resampling.BICUBIC))
    shrinks = image.shape[0] > size or image.shape[1] > size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (size, size), interpolation=method), dtype=np.uint8)


def rotate(image: Image, config: TransformConfig, uniform: list[float]) -> Image:
    """Turn a square image about its middle by up to `config.rotate` degrees; its corners become black."""
    return _turned(image, config.rotate * (2 * uniform[_CROP] - 1), 0)


def rand_augment(image: Image, config: TransformConfig, uniform: list[float]) -> Image:
    """`config.rand_augment` operations drawn with replacement, each made with chance 1/2, at one strength.

    (RandAugment of ten operations as ALBEF, MedKLIP and MeDSLIP publish it; at level 7 of 10: factors of
    1.36, shears of 0.21, shifts of 7 pixels and 21 degrees, to either side.)
    """
    for number in range(config.rand_augment):
        start = _CROP + _ROTATION + _OPERATION * number
        which, chance, side = uniform[start : start + _OPERATION]
        if chance < 0.5:
            image = _operation(image, int(which * 10), config.rand_augment_level / 10, side < 0.5)
    return image


def _operation(image: Image, which: int, strength: float, negative: bool) -> Image:
    sign, levels = -1.0 if negative else 1.0, np.arange(256.0)
    if which == 1:
        low, high = int(image.min()), int(image.max())
        if low == high:
            return image
        return _looked_up(image, (levels - low) * (255 / (high - low)))
    if which == 2:
        return np.asarray(cv2.equalizeHist(np.ascontiguousarray(image)), dtype=np.uint8)
    if which == 3:
        return _looked_up(image, levels * (0.1 + 1.8 * strength))
    if which == 4:
        return _sharpened(image, 0.1 + 1.8 * strength)
    shear, shift = sign * 0.3 * strength, sign * 10 * strength
    matrices = {
        5: [[1, shear, 0], [0, 1, 0]],
        6: [[1, 0, 0], [shear, 1, 0]],
        7: [[1, 0, shift], [0, 1, 0]],
        8: [[1, 0, 0], [0, 1, shift]],
    }
    if which in matrices:
        return _warped(image, np.array(matrices[which], dtype=np.float64), _GRAY)
    return _turned(image, sign * 30 * strength, _GRAY) if which == 9 else image


def _looked_up(image: Image, levels: np.ndarray) -> Image:
    changed: Image = np.clip(levels, 0, 255).astype(np.uint8)[image]
    return changed


def _sharpened(image: Image, factor: float) -> Image:
    """Away from (or towards) the smoothed image; the border pixels stay."""
    kernel = np.ones((3, 3), dtype=np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(image.astype(np.float32), -1, kernel / 13)
    sharp = smooth + factor * (image - smooth)
    result = image.copy()
    result[1:-1, 1:-1] = np.clip(sharp[1:-1, 1:-1], 0, 255).astype(np.uint8)
    return result


def _turned(image: Image, degrees: float, fill: int) -> Image:
    rows, columns = image.shape
    matrix = cv2.getRotationMatrix2D(((columns - 1) / 2, (rows - 1) / 2), degrees, 1)
    return _warped(image, np.asarray(matrix, dtype=np.float64), fill)


def _warped(image: Image, matrix: np.ndarray, fill: int) -> Image:
    size = (image.shape[1], image.shape[0])
    warped = cv2.warpAffine(
        np.ascontiguousarray(image), matrix, size, flags=cv2.INTER_LINEAR, borderValue=(fill,)
    )
    return np.asarray(warped, dtype=np.uint8)

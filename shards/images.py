"""Image files to square 8-bit grayscale pixels, and back to the bytes a shard stores."""

from __future__ import annotations

import io
import warnings
from typing import Any, TypeVar

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from shards.errors import DataError

#: Largest image that is decoded; a header that promises more is refused before any pixel is allocated.
MAX_PIXELS = 8192 * 8192
#: Percentiles of the pixel values that become black and white when more than 8 bits are reduced to 8.
WINDOW_PERCENTILES = (0.5, 99.5)

#: Pixels of any depth, before they are reduced to 8 bits.
DeepImage = NDArray[np.integer[Any] | np.floating[Any]]
#: A label mask of 8 or 16 bits.
Mask = NDArray[np.uint8] | NDArray[np.uint16]

_Pixel = TypeVar("_Pixel", np.uint8, np.uint16)

_TIFF_PHOTOMETRIC = 262
_MIN_IS_WHITE = 0


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG (8 or 16 bit) or TIFF file to grayscale pixels uint8 [height, width].

    Colour becomes luminance, transparency is dropped, of a multi-page TIFF the first page is read. Images
    of more than 8 bits are windowed by `window_to_8_bit`.

    Raises:
        DataError: empty, truncated or unknown data, or more than `max_pixels` pixels.
    """
    if not data:
        raise DataError("image file is empty")
    if data.startswith(b"\xff\xd8"):
        return _decode_jpeg(data, max_pixels)
    return _decode_png_or_tiff(data, max_pixels)


def window_to_8_bit(image: DeepImage) -> NDArray[np.uint8]:
    """Map the 0.5th to 99.5th percentile of the pixel values linearly to 0..255, clipping beyond.

    Percentiles rather than the extremes, because burnt-in markers and dead pixels would otherwise flatten
    the anatomy. Of an image without that spread (nearly constant) the extremes are used.
    """
    low, high = (float(value) for value in np.percentile(image, WINDOW_PERCENTILES))
    if high <= low:
        low, high = float(image.min()), float(image.max())
    scaled = (image.astype(np.float32) - low) * (255.0 / max(high - low, 1.0e-12))
    windowed: NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return windowed


def fit_square(image: NDArray[np.uint8], size: int) -> tuple[NDArray[np.uint8], float, int, int]:
    """Resize so that the longer side is `size` and pad with zeros to [size, size], as MGCA does.

    The shorter side is rounded down; area interpolation; an odd extra row or column of padding goes to the
    bottom or right. Source: MGCA's preprocessing.

    Returns:
        The square image; the scale from old to new pixels; left and top padding in new pixels.
    """
    height, width = image.shape
    new_height, new_width, left, top = square_geometry(height, width, size)
    square = np.zeros((size, size), dtype=np.uint8)
    square[top : top + new_height, left : left + new_width] = cv2.resize(
        image, (new_width, new_height), interpolation=cv2.INTER_AREA
    )
    return square, size / max(height, width), left, top


def fit_square_mask(mask: NDArray[_Pixel], size: int) -> NDArray[_Pixel]:
    """Bring a label mask into the square of `fit_square` with nearest-neighbour interpolation."""
    new_height, new_width, left, top = square_geometry(mask.shape[0], mask.shape[1], size)
    square = np.zeros((size, size), dtype=mask.dtype)
    square[top : top + new_height, left : left + new_width] = cv2.resize(
        mask, (new_width, new_height), interpolation=cv2.INTER_NEAREST
    )
    return square


def square_geometry(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """New height, new width, left and top padding of a [height, width] image in a square of `size`."""
    longer = max(height, width)
    new_height = max(1, size * height // longer)
    new_width = max(1, size * width // longer)
    return new_height, new_width, (size - new_width) // 2, (size - new_height) // 2


def encode_jpeg(image: NDArray[np.uint8], quality: int = 90) -> bytes:
    """Encode grayscale pixels [height, width] as a one-channel JPEG."""
    pixels = np.ascontiguousarray(image[:, :, None])
    return bytes(simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="GRAY"))


def encode_png(image: Mask) -> bytes:
    """Encode one channel of 8 or 16 bits [height, width] as PNG, without loss."""
    encoded, data = cv2.imencode(".png", image)
    if not encoded:
        raise ValueError(f"cannot encode pixels of type {image.dtype} and shape {image.shape} as PNG")
    return data.tobytes()


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(height, width, max_pixels)
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="GRAY")
    except ValueError as error:
        raise DataError(f"broken JPEG: {error}") from error
    return pixels[:, :, 0]


def _decode_png_or_tiff(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """PIL, because unlike OpenCV it refuses truncated files and gives the size before decoding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about sizes and tags; both are judged here
            image = Image.open(io.BytesIO(data), formats=["PNG", "TIFF"])
            _check_pixels(image.height, image.width, max_pixels)
            if image.mode.startswith(("I", "F")):
                return _window_deep(image)
            return np.asarray(image.convert("L"))
    except Image.DecompressionBombError as error:
        raise DataError(f"image has more than {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise DataError("not a JPEG, PNG or TIFF image") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"broken image: {error}") from error


def _window_deep(image: Image.Image) -> NDArray[np.uint8]:
    """Reduce an image of 16 or 32 bits; PIL leaves those of "white is zero" TIFFs uninverted."""
    deep = np.asarray(image)
    if not np.isfinite(deep).all():
        raise DataError("image has pixels that are not numbers")
    pixels = window_to_8_bit(deep)
    tags = getattr(image, "tag_v2", {})
    return 255 - pixels if tags.get(_TIFF_PHOTOMETRIC) == _MIN_IS_WHITE else pixels


def _check_pixels(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise DataError(f"image of {width} x {height} pixels is larger than the limit of {most} pixels")

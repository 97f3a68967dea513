"""Images of anybody - files, arrays, tensors - as the network sees them, and where its maps lie in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp.data.transforms import View, evaluation_view
from shards.dicom import read_dicom
from shards.dicom_windows import Window
from shards.errors import DataError, UsageError
from shards.images import decode_image, fit_square, read_image_file, square_geometry

Pixels = NDArray[np.uint8]
#: One image: a path, an array [H, W] or [H, W, 3], or a tensor [H, W] or [1, H, W]; uint8.
ImageLike: TypeAlias = str | Path | NDArray[Any] | Tensor

#: What a DICOM file has after 128 bytes.
_DICOM, _DICOM_AT = b"DICM", 128


@dataclass(frozen=True)
class Seen:
    """An image and the part of it that the network sees.

    Attributes:
        pixels: [H, W] of the image. name: its path, or "".
        view: [size, size], what the network gets; where: which part of the stored square that is.
        stored: side of the square in pixels.
    """

    pixels: Pixels
    name: str
    view: Pixels
    where: View
    stored: int

    def laid_out(self, grid: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """A map [rows, columns] over the view as [H, W] over the image; NaN where the network saw nothing."""
        height, width = self.pixels.shape
        square = np.full((self.stored, self.stored), np.nan, dtype=np.float32)
        left, top = round(self.where.left), round(self.where.top)
        size = round(self.where.width), round(self.where.height)
        enlarged = cv2.resize(grid.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        square[top : top + size[1], left : left + size[0]] = enlarged
        rows, columns, left, top = square_geometry(height, width, self.stored)
        inside = square[top : top + rows, left : left + columns]
        # Bilinear weights would spread NaN: the nearest pixel of the square says what was seen.
        found = cv2.resize(inside, (width, height), interpolation=cv2.INTER_NEAREST)
        return np.asarray(found, dtype=np.float32)


def images_of(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One image or several as a list; a tensor [B, 1, H, W] is B images."""
    if isinstance(images, Tensor | np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | Path):
        return [images]
    return list(images)


def see(image: ImageLike, stored: int, size: int, crop: str, window: Window = "auto") -> Seen:
    """Read one image and bring it into the form that evaluation gives the network.

    Args:
        image: see `ImageLike`. Files may be JPEG, PNG, TIFF or DICOM.
        stored: side of the square that datasets store images in. size, crop: of the network's input.
        window: of a DICOM file.

    Raises:
        DataError: a file that cannot be read.
        UsageError: an array that is no 8-bit image.
    """
    pixels = _read(Path(image), window) if isinstance(image, str | Path) else _pixels(image)
    square, *_ = fit_square(pixels, stored)
    view, where = evaluation_view(square, size, crop)
    return Seen(pixels, str(image) if isinstance(image, str | Path) else "", view, where, stored)


def is_dicom(path: Path) -> bool:
    """Whether a file that can be read begins as DICOM files do."""
    try:
        with path.open("rb") as file:
            return file.read(_DICOM_AT + 4)[_DICOM_AT:] == _DICOM
    except OSError:
        return False


def stacked(seen: Sequence[Seen]) -> Tensor:
    """[B, 1, size, size] uint8 views."""
    return torch.from_numpy(np.stack([one.view for one in seen])[:, None])


def _read(path: Path, window: Window) -> Pixels:
    try:
        data = read_image_file(path)
        if data[_DICOM_AT : _DICOM_AT + 4] == _DICOM:
            return np.asarray(read_dicom(data, window).pixels, dtype=np.uint8)
        return decode_image(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of an image") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _pixels(image: NDArray[Any] | Tensor) -> Pixels:
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.dtype != np.uint8:
        raise UsageError(
            f"an image of {array.dtype}: give 8-bit values (uint8, 0 black to 255 white); normalising is the "
            "model's own"
        )
    if array.ndim == 3 and array.shape[2] == 3:
        array = cv2.cvtColor(np.ascontiguousarray(array), cv2.COLOR_RGB2GRAY)
    if array.ndim != 2 or not array.size:
        raise UsageError(f"an image of shape {list(array.shape)}: give [H, W], [1, H, W] or [H, W, 3]")
    return np.ascontiguousarray(array)

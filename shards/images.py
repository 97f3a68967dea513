"""Image files to square 8-bit grayscale pixels, and back to the bytes a shard stores."""

import io
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from shards.errors import DataError
from shards.format import IMAGE_LIMIT
from shards.strict_json import JsonError, read_limited

#: Largest image that is decoded; a header that promises more is refused before any pixel is allocated.
MAX_PIXELS = 8192 * 8192
#: Percentiles of the pixel values that become black and white when more than 8 bits are reduced to 8.
WINDOW_PERCENTILES = (0.5, 99.5)

#: Pixels of any depth, before they are reduced to 8 bits.
DeepImage = NDArray[np.integer[Any] | np.floating[Any]]
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_PHOTOMETRIC = 262
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB = 0, 1, 2
_UNCOMPRESSED, _CONTIGUOUS = 1, 1
_SIGNED, _FLOAT = 2, 3
#: Place of the EXIF tag that says how an image is to be turned.
_ORIENTATION = 274
#: Weights of red, green and blue in luminance (ITU-R BT.601, as JPEG and PIL have it).
_LUMINANCE = np.array((0.299, 0.587, 0.114), dtype=np.float32)


def read_image_file(path: Path) -> bytes:
    """Content of a file that `decode_image`, `shards.masks` or `shards.dicom` reads.

    Raises:
        OSError: it cannot be read.
        DataError: a pipe, socket, device or folder, or more than `IMAGE_LIMIT` bytes.
    """
    try:
        return read_limited(path, IMAGE_LIMIT)
    except JsonError as error:
        raise DataError(f"file: {error}") from error


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, placed: bool = False) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or TIFF file to grayscale pixels uint8 [height, width].

    Colour becomes luminance, transparency is dropped, of a multi-page TIFF the first page is read. Images of
    more than 8 bits a channel, of any layout, are windowed by `window_to_8_bit`. The image is turned as its
    EXIF orientation (or TIFF's own) says.

    Args:
        data: the file. max_pixels: of an image that is decoded.
        placed: boxes or masks are drawn in the image, so it may not be turned (`refuse_turned`).

    Raises:
        DataError: empty, truncated or unknown data, a layout that is not read, more than `max_pixels`
            pixels, or a turned image that may not be.
    """
    pixels, orientation = decode_turned(data, max_pixels)
    if placed:
        refuse_turned(orientation)
    return pixels


def refuse_turned(orientation: int) -> None:
    """Refuse the places in an image that its EXIF orientation (see `decode_turned`) turns or mirrors.

    Some programs draw on the stored pixels and some on the shown ones, and no file says which: turning the
    places with the image is wrong for the ones, leaving them for the others.

    Raises:
        DataError: it turns it.
    """
    if orientation != 1:
        raise DataError(
            f"EXIF orientation {orientation} turns the image, and boxes or masks may be drawn on the stored "
            "pixels or on the turned ones: turn the pixels themselves where they are drawn on what viewers "
            "show (mogrify -auto-orient), else remove the tag (exiftool -Orientation=)"
        )


def decode_turned(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[NDArray[np.uint8], int]:
    """The pixels of `decode_image`, and the orientation (1 to 8) by which they were turned; 1: not."""
    if not data:
        raise DataError("image file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about sizes and tags; both are judged here
            if data.startswith(b"\xff\xd8"):
                return _decode_jpeg(data, max_pixels)
            if data.startswith(_TIFF_MAGIC):
                return _decode_tiff(data, max_pixels)
            return _decode_png(data, max_pixels)
    except Image.DecompressionBombError as error:
        raise DataError(f"image has more than {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise DataError("not a JPEG, PNG or TIFF image") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"broken image: {error}") from error


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


def fit_square_mask(mask: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bring a mask of 0 and 1 into the square of `fit_square`.

    Where it shrinks, a pixel is inside that the mask covers by half; a mask too thin or small for that keeps
    the pixels it covers most, since a mask of zeros would say that nothing is there.
    """
    height, width = mask.shape
    new_height, new_width, left, top = square_geometry(height, width, size)
    if max(height, width) <= size:
        fitted = cv2.resize(mask, (new_width, new_height), interpolation=cv2.INTER_NEAREST) > 0
    else:
        covered = cv2.resize(mask.astype(np.float32), (new_width, new_height), interpolation=cv2.INTER_AREA)
        # Sums of many shares in float32 stay a little below what they add up to.
        fitted = (covered > 0) & (covered >= min(0.5, float(covered.max())) - 1.0e-5)
    square = np.zeros((size, size), dtype=np.uint8)
    square[top : top + new_height, left : left + new_width] = fitted
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


def encode_png(image: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """Encode one channel of 8 or 16 bits [height, width] as PNG, without loss."""
    encoded, data = cv2.imencode(".png", image)
    if not encoded:
        raise ValueError(f"cannot encode pixels of type {image.dtype} and shape {image.shape} as PNG")
    return data.tobytes()


def _decode_jpeg(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(height, width, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return _oriented(*_opened(data, max_pixels, "JPEG"))
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="GRAY")[:, :, 0]
    except (OSError, ValueError) as error:
        raise DataError(f"broken JPEG: {error}") from error
    # Stored shards are read here too: PIL opens only files that hold the tag's block.
    if b"Exif\0" in data or b"tiff:Orientation" in data:
        return _oriented(pixels, _orientation(Image.open(io.BytesIO(data), formats=["JPEG"])))
    return pixels, 1


def _decode_png(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    pixels, orientation = _opened(data, max_pixels, "PNG")
    depth, colour = data[24], data[25]
    if depth == 16 and colour != 0:  # PIL keeps the high bytes of colour and of gray with alpha only
        deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is None or deep.dtype != np.uint16 or deep.shape[:2] != pixels.shape:
            raise DataError("broken image: 16-bit PNG cannot be decoded")
        pixels = _window_channels(deep[:, :, 2::-1] if deep.ndim == 3 and deep.shape[2] > 2 else deep)
    return _oriented(pixels, orientation)


def _decode_tiff(data: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    """By PIL; layouts that PIL cuts to 8 bits or does not know by tifffile."""
    page = _first_page(data)
    height, width = int(page.imagelength), int(page.imagewidth)
    _check_pixels(height, width, max_pixels)
    depth, kind = int(page.bitspersample), int(page.sampleformat)
    if depth == 8 and kind == _SIGNED:
        raise DataError("TIFF of signed 8-bit pixels is not read; convert it to unsigned")
    deep = depth > 8 and (page.samplesperpixel > 1 or depth == 64 or (depth, kind) == (16, _FLOAT))
    tag = page.tags.get(_ORIENTATION)
    orientation = tag.value if tag is not None and isinstance(tag.value, int) else 1
    if not deep:
        pixels, left = _opened(data, max_pixels, "TIFF")  # PIL turns TIFFs itself
        return _oriented(pixels, left)[0], orientation if 1 <= orientation <= 8 else 1
    return _oriented(_deep_tiff(data, page), orientation)


def _first_page(data: bytes) -> tifffile.TiffPage:
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
    except Exception as error:  # a damaged header raises whatever its bytes lead to
        raise DataError(f"broken image: TIFF header cannot be read ({type(error).__name__})") from error
    if not isinstance(page, tifffile.TiffPage):
        raise DataError("broken image: TIFF without a page")
    return page


def _deep_tiff(data: bytes, page: tifffile.TiffPage) -> NDArray[np.uint8]:
    """Pixels of a page with several deep channels or of 16-bit or 64-bit floating point, not yet turned.

    Compressed ones are left to OpenCV, whose library never unpacks more than a strip should hold.
    """
    samples, photometric = int(page.samplesperpixel), int(page.photometric)
    layout = f"TIFF of {samples} channels of {page.bitspersample} bits, photometric {photometric}"
    colours = {_MIN_IS_WHITE: 1, _MIN_IS_BLACK: 1, _RGB: 3}.get(photometric, 0)
    if not 0 < colours <= samples or page.dtype is None:
        raise DataError(f"{layout}, is not read; convert it to gray or RGB")
    if page.compression == _UNCOMPRESSED:
        ends = [start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if max(ends, default=0) > len(data) or sum(page.databytecounts) < page.nbytes:
            raise DataError("broken image: TIFF is truncated")
        try:
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                pixels = file.pages.first.asarray()
        except Exception as error:  # as in `_first_page`
            raise DataError(f"broken image: TIFF cannot be read ({type(error).__name__})") from error
        if samples > 1 and page.planarconfig != _CONTIGUOUS:
            pixels = np.moveaxis(pixels, 0, -1)
    else:
        turned = _ORIENTATION in page.tags and page.tags[_ORIENTATION].value != 1
        if colours != 3 or page.planarconfig != _CONTIGUOUS or turned:
            raise DataError(f"{layout}, is read uncompressed only")
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if found is None or found.dtype != page.dtype or found.ndim != 3 or found.shape[2] < 3:
            raise DataError(f"{layout}, cannot be unpacked; store it uncompressed")
        pixels = found[:, :, 2::-1]
    pixels = pixels.reshape(page.imagelength, page.imagewidth, -1)
    return _window_channels(pixels[:, :, :colours], inverted=photometric == _MIN_IS_WHITE)


def _opened(data: bytes, max_pixels: int, kind: str) -> tuple[NDArray[np.uint8], int]:
    """8-bit pixels by PIL, which unlike OpenCV refuses truncated files, and how they are to be turned."""
    image = Image.open(io.BytesIO(data), formats=[kind])
    _check_pixels(image.height, image.width, max_pixels)
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(_TIFF_PHOTOMETRIC) == _MIN_IS_WHITE
    image.load()
    if image.mode.startswith(("I", "F")):  # PIL leaves those of "white is zero" TIFFs uninverted
        pixels = _window_channels(np.asarray(image), inverted)
    else:
        pixels = np.asarray(image.convert("L"))
    # Asked after loading: PIL turns TIFFs itself and then forgets the tag.
    return pixels, _orientation(image)


def _window_channels(deep: DeepImage, inverted: bool = False) -> NDArray[np.uint8]:
    """Window the first channel of [H, W, C], or the luminance of three or more; inverted where white is 0."""
    if not np.isfinite(deep).all():
        raise DataError("image has pixels that are not numbers")
    if deep.ndim == 3:
        deep = deep[:, :, :3].astype(np.float32) @ _LUMINANCE if deep.shape[2] > 2 else deep[:, :, 0]
    pixels = window_to_8_bit(deep)
    return 255 - pixels if inverted else pixels


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) else 1


def _oriented(pixels: NDArray[np.uint8], orientation: int) -> tuple[NDArray[np.uint8], int]:
    """Turned and mirrored as EXIF's value 1 to 8 says, and that value; any other counts as 1."""
    orientation = orientation if 1 <= orientation <= 8 else 1
    if 5 <= orientation <= 8:
        pixels = pixels.T
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels), orientation


def _check_pixels(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise DataError(f"image of {width} x {height} pixels is larger than the limit of {most} pixels")

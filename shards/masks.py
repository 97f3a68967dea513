"""Masks of findings: one PNG for all masks of a sample, and the run lengths that archives write them as."""

import io
import struct
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.errors import DataError
from shards.format import INDEX_MASK_EXTENSION, MASKS_EXTENSION
from shards.images import MAX_PIXELS

#: Most pixels of all masks of a sample: 128 masks of 1024 x 1024, 8 of 4096 x 4096.
MOST_PIXELS = 1 << 27

#: Run lengths are pairs of numbers. absolute: first pixel, counted from 1, and length, as in most tables of
#: Kaggle. relative: gap since the last run, and length, as in SIIM-ACR's.
RunKind = Literal["absolute", "relative"]
#: What pixels are counted along: down the columns, or along the rows.
RunOrder = Literal["columns", "rows"]

_HEADER = struct.Struct(">8s4x4sIIBBBBB")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode_masks(masks: Sequence[NDArray[np.uint8]]) -> bytes:
    """Masks [height, width] of 0 and 1, stacked below each other, as a PNG of one bit a pixel.

    Raises:
        DataError: more than `MOST_PIXELS` pixels.
    """
    stacked = np.concatenate(masks)
    if stacked.size > MOST_PIXELS:
        raise DataError(f"{len(masks)} masks have more than {MOST_PIXELS} pixels together")
    buffer = io.BytesIO()
    Image.fromarray(stacked.astype(bool)).save(buffer, "PNG")
    return buffer.getvalue()


def decode_masks(data: bytes, count: int, size: int) -> NDArray[np.uint8]:
    """The masks of `encode_masks`, [count, size, size] of 0 and 1.

    Raises:
        DataError: no PNG of such masks, or a broken one; judged by its first bytes before memory is taken.
    """
    if count * size * size > MOST_PIXELS:
        raise DataError(f"{count} masks of {size} x {size} have more than {MOST_PIXELS} pixels")
    expected = (_SIGNATURE, b"IHDR", size, count * size, 1, 0, 0, 0, 0)
    if len(data) < _HEADER.size or _HEADER.unpack_from(data) != expected:
        raise DataError(f"masks are no PNG of {count} times {size} x {size} pixels of one bit")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about sizes, which are judged above
            stacked = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"broken masks: {error}") from error
    return stacked.reshape(count, size, size).astype(np.uint8)


def read_masks(
    members: Mapping[str, bytes], names: Sequence[str], label_names: Sequence[str], size: int
) -> dict[str, NDArray[np.uint8]]:
    """The masks of a sample of either format version, finding -> [size, size] of 0 and 1.

    An index mask of version 1 gives a mask to each finding it shows; where findings overlap the pixels are
    those of one only, and of a finding that it does not show nothing is known.

    Args:
        members: at least the masks of the sample, by extension.
        names: findings of its masks, as its metadata name them; version 1 names none.
        label_names, size: of the dataset.

    Raises:
        DataError: the masks are broken or not those the metadata name.
    """
    if INDEX_MASK_EXTENSION in members:
        index = _decode_index_mask(members[INDEX_MASK_EXTENSION], size)
        numbers = np.unique(index[index > 0]).tolist()
        if numbers and numbers[-1] > len(label_names):
            raise DataError("mask has numbers of findings that are no labels of the dataset")
        return {label_names[number - 1]: (index == number).astype(np.uint8) for number in numbers}
    if bool(names) != (MASKS_EXTENSION in members):
        raise DataError("masks and the names of masks are not both there")
    if not names:
        return {}
    return dict(zip(names, decode_masks(members[MASKS_EXTENSION], len(names), size), strict=True))


def decode_runs(
    text: str, height: int, width: int, kind: RunKind, order: RunOrder = "columns"
) -> NDArray[np.uint8]:
    """A mask [height, width] of 0 and 1 from its run lengths.

    Gaps read as starts are nearly always told, because they do not increase; starts read as gaps leave the
    image, unless they are few and small.

    Raises:
        DataError: not pairs of whole numbers, runs without a pixel, starts that do not increase, or not
            inside a mask of that size.
    """
    words = text.split()
    if not words or len(words) % 2 or not all(word.isascii() and word.isdecimal() for word in words):
        raise DataError("run lengths are no pairs of whole numbers")
    pixels = height * width
    if len(words) // 2 > pixels or any(len(word) > 9 or int(word) > pixels for word in words):
        raise DataError(f"run lengths leave a mask of {width} x {height} pixels")
    first, lengths = np.array(words, dtype=np.int64).reshape(-1, 2).T
    if not lengths.all():
        raise DataError("run lengths hold a run without a pixel")
    ends = np.cumsum(first + lengths) if kind == "relative" else first - 1 + lengths
    starts = ends - lengths
    if (starts[1:] < ends[:-1]).any():
        raise DataError("run lengths have starts that do not increase; are they relative?")
    if starts[0] < 0 or ends[-1] > pixels:
        raise DataError(f"run lengths leave a mask of {width} x {height} pixels ({kind} ones were expected)")
    steps = np.zeros(pixels + 1, dtype=np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends, -1)
    flat = np.cumsum(steps[:-1], dtype=np.int8).astype(np.uint8)
    mask = flat.reshape(height, width) if order == "rows" else flat.reshape(width, height).T
    return np.ascontiguousarray(mask)


def read_mask_image(data: bytes) -> NDArray[np.uint8]:
    """A PNG file of one mask, [height, width] of 0 and 1: black is outside, one other value inside.

    Raises:
        DataError: no PNG, too large, or more than two values, as a map of several findings has.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"mask of more than {MAX_PIXELS} pixels")
            # Deep gray is kept: its upper bytes alone may be zero.
            pixels = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    except Image.DecompressionBombError as error:
        raise DataError(f"mask of more than {MAX_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"mask is no PNG or a broken one: {error}") from error
    inside = pixels > 0
    if len(np.unique(pixels[inside])) > 1:
        raise DataError("mask has more than two values")
    return inside.astype(np.uint8)


def encode_runs(mask: NDArray[np.uint8], kind: RunKind, order: RunOrder = "columns") -> str:
    """The run lengths of a mask of 0 and 1, as `decode_runs` reads them; "" for a mask of zeros."""
    flat = (mask if order == "rows" else mask.T).ravel()
    edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=0, append=0))
    starts, ends = edges[0::2], edges[1::2]
    first = starts + 1 if kind == "absolute" else starts - np.concatenate([[0], ends])[: len(starts)]
    return " ".join(map(str, np.stack([first, ends - starts], axis=1).ravel().tolist()))


def _decode_index_mask(data: bytes, size: int) -> NDArray[np.uint8]:
    # The size stands in the first chunk; OpenCV would take memory for whatever that claims.
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[2:4] != (size, size):
        raise DataError("mask is no PNG of the size of the image")
    mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.shape != (size, size) or mask.dtype != np.uint8:
        raise DataError("mask does not decode to one channel of 8 bits")
    return np.asarray(mask, dtype=np.uint8)

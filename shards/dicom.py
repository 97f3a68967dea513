"""DICOM radiographs to 8-bit grayscale pixels, bright bone on dark air, and the header fields a build needs.

The order of the steps is that of the standard (PS3.3 C.11): stored bits, modality table or rescale, window,
polarity.
"""

import io
from dataclasses import dataclass
from typing import Any, get_args

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from shards.dicom_header import (
    DicomHeader,
    dicom_errors,
    header_fields,
    integer_of,
    refuse_deflated,
    text_of,
)
from shards.dicom_windows import Window, is_padding, modality, show
from shards.errors import DataError
from shards.images import MAX_PIXELS

#: pip packages that decode a compressed transfer syntax, where pydicom with Pillow cannot.
_PLUGINS = {
    "1.2.840.10008.1.2.4.50": "pillow",
    "1.2.840.10008.1.2.4.51": "pylibjpeg pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.57": "pylibjpeg pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.70": "pylibjpeg pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.80": "pylibjpeg pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.81": "pylibjpeg pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.90": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg pylibjpeg-openjpeg",
}

_GRAYSCALE = ("MONOCHROME1", "MONOCHROME2")
#: Where the rows and columns of an image may point (PatientOrientation).
_LENGTHWISE, _SIDEWAYS = ("H", "F"), ("L", "R", "A", "P")

_TURNED = (
    "films were turned or mirrored as PatientOrientation says: look at some (medvlp shards view), and keep "
    "them as stored if it is wrong"
)
_AS_STORED = "films are turned or mirrored by PatientOrientation, and were kept as stored"
_PADDED = "films' padding is black (PixelPaddingValue)"
_IGNORED = (
    "films are shown without the table or window of their files, which do not fit their pixels (made for "
    "another bit depth)"
)


@dataclass(frozen=True, kw_only=True)
class Radiograph(DicomHeader):
    """One image of a DICOM file, and what its header says of it.

    Attributes:
        pixels: uint8 [height, width], square pixels, air dark.
        scale: across and down, pixels of `pixels`, before these are turned, for one of the file; not 1 where
            the file's are not square.
        notes: what was done to it that whoever builds of many should be told.
    """

    pixels: NDArray[np.uint8]
    scale: tuple[float, float]
    notes: tuple[str, ...]


def read_dicom(
    data: bytes, window: Window = "auto", max_pixels: int = MAX_PIXELS, *, turn: bool = True
) -> Radiograph:
    """Read the one image of a DICOM file.

    Args:
        data: the file.
        window: see `Window`.
        max_pixels: larger images are refused before memory is taken.
        turn: turn and mirror it as radiographs hang, where PatientOrientation says that it is not so stored;
            not where boxes or masks were drawn in the stored pixels.

    Raises:
        DataError: no DICOM file, several frames, no pixels, too many of them, damaged, or compressed in a way
            that needs a package which is not installed (it is named). Messages hold nothing of the header but
            technical fields.
    """
    if window not in get_args(Window):
        raise ValueError(f"window {window!r}: choose {', '.join(get_args(Window))}")
    with dicom_errors():
        return _read(data, window, max_pixels, turn)


def _read(data: bytes, window: Window, max_pixels: int, turn: bool) -> Radiograph:
    header = _read_header(data)
    _check(header, max_pixels)
    shown, notes = _shown(_decode(header), header, window)
    pixels = _with_square_pixels(shown, header)
    scale = (pixels.shape[1] / shown.shape[1], pixels.shape[0] / shown.shape[0])
    hung = _as_it_hangs(pixels, header)
    if hung is not pixels:
        pixels = hung if turn else pixels
        notes.append(_TURNED if turn else _AS_STORED)
    return Radiograph(**header_fields(header), pixels=pixels, scale=scale, notes=tuple(notes))


def _read_header(content: bytes) -> Any:
    refuse_deflated(io.BytesIO(content))
    return pydicom.dcmread(io.BytesIO(content))


def _check(header: Any, max_pixels: int) -> None:
    """Refuse what has no single gray or colour image of a sane size."""
    rows, columns = (integer_of(header, name) for name in ("Rows", "Columns"))
    if "PixelData" not in header or not rows or not columns:
        raise DataError("DICOM file has no image")
    frames = integer_of(header, "NumberOfFrames") or 1
    if frames != 1:
        raise DataError(f"DICOM file has {frames} frames, not one image")
    if rows * columns > max_pixels:
        raise DataError(f"image of {columns} x {rows} pixels is larger than the limit of {max_pixels} pixels")
    allocated = integer_of(header, "BitsAllocated")
    if allocated not in (1, 8, 16):
        raise DataError(f"DICOM image has {allocated} bits allocated; 1, 8 and 16 are read")


def _decode(header: Any) -> NDArray[Any]:
    """Stored values [height, width] or colour [height, width, 3], unused bits removed."""
    syntax = UID(header.file_meta.get("TransferSyntaxUID", ""))
    try:
        decoded = pixel_array(header)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        # Only a missing decoder ends here without the decoder having looked at the pixels.
        if syntax in _PLUGINS and "plugin" in str(error):
            raise DataError(
                f"compressed as {syntax.name}; to read it: pip install {_PLUGINS[syntax]}"
            ) from error
        raise DataError(f"pixels of a DICOM file ({syntax.name}) cannot be decoded") from error
    expected = (header.Rows, header.Columns)
    if decoded.shape[:2] != expected:
        raise DataError(f"DICOM image is of {decoded.shape[:2]} pixels, its header says {expected}")
    # pydicom takes the lowest BitsStored bits; with another HighBit the value lies further up.
    shift = (integer_of(header, "HighBit") or 0) + 1 - header.BitsStored
    if shift > 0 and not syntax.is_compressed:
        raw = pixel_array(header, raw=True, correct_unused_bits=False)
        mask = (1 << header.BitsStored) - 1
        decoded = (raw.view(np.uint16 if raw.itemsize == 2 else np.uint8) >> shift) & mask
        if header.PixelRepresentation == 1:
            decoded = decoded.astype(np.int32)
            decoded[decoded > mask >> 1] -= mask + 1
    return decoded


def _shown(stored: NDArray[Any], header: Any, window: Window) -> tuple[NDArray[np.uint8], list[str]]:
    """Grey levels, and what is to be told of them."""
    photometric = text_of(header, "PhotometricInterpretation").upper()
    if photometric not in _GRAYSCALE:
        return _gray(stored, header, photometric), []
    if stored.ndim != 2:
        raise DataError(f"DICOM image of {stored.shape[2]} samples a pixel calls itself {photometric}")
    first = int(stored.min())
    places = stored.astype(np.int64) - first
    counts = np.bincount(places.reshape(-1))
    values = modality(np.arange(first, first + len(counts)), header)
    shown, ignored = show(values, counts, header, window)
    notes = [_IGNORED] if ignored else []
    levels = np.clip(np.rint(shown * 255), 0, 255).astype(np.uint8)
    if photometric == "MONOCHROME1":
        levels = 255 - levels
    pixels = levels[places]
    padding = is_padding(values, header)
    if window == "auto" and counts[padding].any() and (outside := _from_the_border(padding[places])).any():
        pixels[outside] = 0
        notes.append(_PADDED)
    if window == "equalize":
        # After the inversion, as the providers of MIMIC-CXR-JPG did.
        pixels = np.asarray(cv2.equalizeHist(pixels), dtype=np.uint8)
    return pixels, notes


def _gray(stored: NDArray[Any], header: Any, photometric: str) -> NDArray[np.uint8]:
    """Luminance of a colour image; pydicom has made RGB of its YBR already."""
    bits = int(header.BitsStored)
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, header)[..., :3]
        bits = 8 * stored.dtype.itemsize  # of the entries of its tables
    if stored.ndim != 3 or stored.shape[2] < 3:
        raise DataError(f"DICOM image of photometric interpretation {photometric or '(none)'} is not read")
    if stored.dtype != np.uint8:
        stored = (stored >> max(0, bits - 8)).astype(np.uint8)
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(stored[..., :3]), cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def _from_the_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The parts of a mask that begin at the border: inside, saturated pixels may have the padding's value."""
    _, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    edges = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    return mask & np.isin(parts, np.unique(edges))


def _with_square_pixels(pixels: NDArray[np.uint8], header: Any) -> NDArray[np.uint8]:
    """Lengthen the side whose pixels are longer, where PixelAspectRatio (vertical, horizontal) says so."""
    ratio = header.get("PixelAspectRatio")
    if ratio is None or len(ratio) != 2 or min(int(side) for side in ratio) <= 0:
        return pixels
    vertical, horizontal = (int(side) for side in ratio)
    if vertical == horizontal:
        return pixels
    height, width = pixels.shape
    if vertical > horizontal:
        height = round(height * vertical / horizontal)
    else:
        width = round(width * horizontal / vertical)
    if height * width > MAX_PIXELS:
        raise DataError(f"DICOM pixels of ratio {vertical}:{horizontal} make an image of {width} x {height}")
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)


def _as_it_hangs(pixels: NDArray[np.uint8], header: Any) -> NDArray[np.uint8]:
    """The image with the head up and, from front or back, the patient's left on the right side.

    PatientOrientation is where its rows and columns point: to Left, Right, Anterior, Posterior, Head or Foot,
    the main direction first ("L", "F" as it hangs). One from the side may face either way: it is turned and
    never mirrored. The same array comes back where nothing is to be done, or said.
    """
    directions = header.get("PatientOrientation")
    if not isinstance(directions, (list, pydicom.multival.MultiValue)) or len(directions) != 2:
        return pixels
    across, down = (str(direction).strip().upper()[:1] for direction in directions)
    mirrored, hung = False, pixels
    if across in _LENGTHWISE:
        hung, across, down, mirrored = hung.T, down, across, True
    if down not in _LENGTHWISE or across not in _SIDEWAYS:
        return pixels
    if down == "H":
        hung, mirrored = hung[::-1], not mirrored
    if across == "R" or (across in ("A", "P") and mirrored):
        hung = hung[:, ::-1]
    return pixels if hung is pixels else np.ascontiguousarray(hung)

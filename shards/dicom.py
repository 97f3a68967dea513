"""DICOM radiographs to 8-bit grayscale pixels, bright bone on dark air, and the header fields a build needs.

The order of the steps is that of the standard (PS3.3 C.11): stored bits, modality table or rescale, window,
polarity. All of them map one stored value to one shown value, so they are computed once for every value that
occurs (65,536 at the most) and then looked up for the pixels.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut, apply_windowing
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from shards.dicom_header import DicomHeader, dicom_errors, header_fields, refuse_deflated, text_of
from shards.errors import DataError
from shards.images import MAX_PIXELS, WINDOW_PERCENTILES

#: How stored values become grey levels. auto: the file's own window, else percentiles. max: 0 is black and
#: the greatest value white (GLoRIA, MGCA). equalize: full range, then histogram equalisation (as the images
#: of MIMIC-CXR-JPG were made; MedKLIP and LoVT do it to RSNA).
Window = Literal["auto", "max", "equalize"]

#: A window with less than this share of the pixels inside belongs to another bit depth and is ignored.
LEAST_INSIDE = 0.01

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

#: Values that occur [V] and how often each does; from them every step is computed.
_Values = NDArray[np.float64]
_Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Radiograph(DicomHeader):
    """One image of a DICOM file, and what its header says of it.

    Attributes:
        pixels: uint8 [height, width], square pixels, air dark.
        scale: across and down, pixels of `pixels` for one of the file; not 1 where the file's are not square.
    """

    pixels: NDArray[np.uint8]
    scale: tuple[float, float]


def read_dicom(data: bytes, window: Window = "auto", max_pixels: int = MAX_PIXELS) -> Radiograph:
    """Read the one image of a DICOM file.

    Args:
        data: the file.
        window: see `Window`.
        max_pixels: larger images are refused before memory is taken.

    Raises:
        DataError: no DICOM file, several frames, no pixels, too many of them, damaged, or compressed in a way
            that needs a package which is not installed (it is named). Messages hold nothing of the header but
            technical fields.
    """
    if window not in get_args(Window):
        raise ValueError(f"window {window!r}: choose {', '.join(get_args(Window))}")
    with dicom_errors():
        return _read(data, window, max_pixels)


def _read(data: bytes, window: Window, max_pixels: int) -> Radiograph:
    header = _read_header(data)
    _check(header, max_pixels)
    stored = _shown(_decode(header), header, window)
    pixels = _with_square_pixels(stored, header)
    scale = (pixels.shape[1] / stored.shape[1], pixels.shape[0] / stored.shape[0])
    return Radiograph(**header_fields(header), pixels=pixels, scale=scale)


def _read_header(content: bytes) -> Any:
    refuse_deflated(io.BytesIO(content))
    return pydicom.dcmread(io.BytesIO(content))


def _check(header: Any, max_pixels: int) -> None:
    """Refuse what has no single gray or colour image of a sane size."""
    rows, columns = (_number(header, name) for name in ("Rows", "Columns"))
    if "PixelData" not in header or not rows or not columns:
        raise DataError("DICOM file has no image")
    frames = _number(header, "NumberOfFrames") or 1
    if frames != 1:
        raise DataError(f"DICOM file has {frames} frames, not one image")
    if rows * columns > max_pixels:
        raise DataError(f"image of {columns} x {rows} pixels is larger than the limit of {max_pixels} pixels")
    allocated = _number(header, "BitsAllocated")
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
    shift = (_number(header, "HighBit") or 0) + 1 - header.BitsStored
    if shift > 0 and not syntax.is_compressed:
        raw = pixel_array(header, raw=True, correct_unused_bits=False)
        mask = (1 << header.BitsStored) - 1
        decoded = (raw.view(np.uint16 if raw.itemsize == 2 else np.uint8) >> shift) & mask
        if header.PixelRepresentation == 1:
            decoded = decoded.astype(np.int32)
            decoded[decoded > mask >> 1] -= mask + 1
    return decoded


def _shown(stored: NDArray[Any], header: Any, window: Window) -> NDArray[np.uint8]:
    photometric = text_of(header, "PhotometricInterpretation").upper()
    if photometric not in _GRAYSCALE:
        return _gray(stored, header, photometric)
    if stored.ndim != 2:
        raise DataError(f"DICOM image of {stored.shape[2]} samples a pixel calls itself {photometric}")
    first = int(stored.min())
    counts = np.bincount((stored.astype(np.int64) - first).reshape(-1))
    values = _modality(np.arange(first, first + len(counts)), header)
    shown = _WINDOWS[window](values, counts, header)
    levels = np.clip(np.rint(shown * 255), 0, 255).astype(np.uint8)
    if photometric == "MONOCHROME1":
        levels = 255 - levels
    pixels = levels[stored.astype(np.int64) - first]
    if window == "auto":
        padding = _is_padding(values, header)
        if levels[padding].any():
            pixels[_from_the_border(padding[stored.astype(np.int64) - first])] = 0
    if window == "equalize":
        # After the inversion, as the providers of MIMIC-CXR-JPG did.
        pixels = np.asarray(cv2.equalizeHist(pixels), dtype=np.uint8)
    return pixels


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


def _modality(values: NDArray[np.int64], header: Any) -> _Values:
    """Stored values to those the window is meant for: a table, or slope and intercept."""
    if header.get("ModalityLUTSequence"):
        return _look_up(values.astype(np.float64), header.ModalityLUTSequence[0])
    slope, intercept = (_decimal(header, name) for name in ("RescaleSlope", "RescaleIntercept"))
    return values.astype(np.float64) * (slope or 1.0) + (intercept or 0.0)


def _look_up(values: _Values, item: Any) -> _Values:
    """Apply a table of a LUT sequence.

    pydicom's own look-up keeps its indices in the type of the table's entries, so that those above 255 start
    again at 0 in a table of 8 bits.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    data, entries = item["LUTData"].value, entries or 65536
    table = np.frombuffer(data, dtype="<u2") if isinstance(data, bytes) else np.asarray(data).astype("<u2")
    if bits <= 8 and 2 * len(table) <= entries + 1:  # the standard's way; many store 16 bits for each entry
        table = table.view(np.uint8)
    entries = min(entries, len(table))
    if first > 32767 and values.min() < 0:
        first -= 65536  # signed, but read as unsigned
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)
    return np.asarray(table[places] & ((1 << bits) - 1), dtype=np.float64)


def _auto(values: _Values, counts: _Counts, header: Any) -> _Values:
    """The file's table, else its first usable window, else percentiles (of more than 8 bits); in [0, 1]."""
    if header.get("VOILUTSequence"):
        shown = _look_up(values, header.VOILUTSequence[0])
        if np.ptp(shown[counts > 0]) > 0:
            return _stretched(shown, 0.0, float((1 << int(header.VOILUTSequence[0].LUTDescriptor[2])) - 1))
    center, width = (_decimal(header, name) for name in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None and width > 1:
        inside = np.abs(values - center) <= width / 2
        if counts[inside].sum() >= LEAST_INSIDE * counts.sum():
            return _windowed(values, center, width, text_of(header, "VOILUTFunction"))
    if header.BitsStored <= 8:
        return _stretched(values, *_held(header))
    return _by_percentiles(values, _without_padding(values, counts, header))


def _held(header: Any) -> tuple[float, float]:
    """Least and greatest value that the stored bits can hold; the slope of a rescale may be negative."""
    count, signed = 1 << header.BitsStored, header.PixelRepresentation == 1
    first = -count // 2 if signed else 0
    values = _modality(np.arange(first, first + count), header)
    return float(values.min()), float(values.max())


def _windowed(values: _Values, center: float, width: float, function: str) -> _Values:
    """The standard's LINEAR, LINEAR_EXACT or SIGMOID, by pydicom on a header made for it."""
    window = pydicom.Dataset()
    window.PhotometricInterpretation, window.PixelRepresentation = "MONOCHROME2", 0
    window.BitsStored, window.WindowCenter, window.WindowWidth = 16, center, width
    if function.upper() in ("LINEAR_EXACT", "SIGMOID"):
        window.VOILUTFunction = function.upper()
    return _stretched(apply_windowing(values, window), 0.0, 65535.0)


def _by_percentiles(values: _Values, counts: _Counts) -> _Values:
    """`WINDOW_PERCENTILES` of the pixels become black and white, as in `shards.images`."""
    rising = np.argsort(values, kind="stable")  # a rescale may fall
    ranks = np.cumsum(counts[rising])
    low, high = (
        float(values[rising][np.searchsorted(ranks, share / 100 * (ranks[-1] - 1), side="right")])
        for share in WINDOW_PERCENTILES
    )
    if high <= low:
        low, high = _range(values, counts)
    return _stretched(values, low, high)


def _without_padding(values: _Values, counts: _Counts, header: Any) -> _Counts:
    """Counts without the values that fill what the detector has not seen, if anything is left."""
    kept = np.where(_is_padding(values, header), 0, counts)
    return kept if kept.any() else counts


def _is_padding(values: _Values, header: Any) -> NDArray[np.bool_]:
    """Which values fill what the detector has not seen: one, or a range whose ends come in any order."""
    padding, limit = (_number(header, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if padding is None:
        return np.zeros(len(values), dtype=np.bool_)
    low, high = sorted(_modality(np.array([padding, padding if limit is None else limit]), header))
    return np.asarray((values >= low - 1e-6) & (values <= high + 1e-6))


def _from_the_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The parts of a mask that begin at the border: inside, saturated pixels may have the padding's value."""
    _, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    edges = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    return mask & np.isin(parts, np.unique(edges))


def _max(values: _Values, counts: _Counts, header: Any) -> _Values:
    return _stretched(values, 0.0, _range(values, counts)[1])


def _full_range(values: _Values, counts: _Counts, header: Any) -> _Values:
    return _stretched(values, *_range(values, counts))


_WINDOWS: dict[str, Callable[[_Values, _Counts, Any], _Values]] = {
    "auto": _auto,
    "max": _max,
    "equalize": _full_range,
}


def _range(values: _Values, counts: _Counts) -> tuple[float, float]:
    present = values[counts > 0]
    return float(present.min()), float(present.max())


def _stretched(values: _Values, low: float, high: float) -> _Values:
    return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


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


def _number(header: Any, name: str) -> int | None:
    value = header.get(name)
    try:
        return None if value is None else int(value)
    except (TypeError, ValueError):
        raise DataError(f"DICOM field {name} is no number") from None


def _decimal(header: Any, name: str) -> float | None:
    """The first of one or several numbers; None where there is none, or it is not finite."""
    value = header.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value[0] if isinstance(value, (list, pydicom.multival.MultiValue)) else value)
    except (TypeError, ValueError, IndexError):
        return None
    return number if np.isfinite(number) else None

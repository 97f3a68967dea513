"""Values that occur in a DICOM film to what is shown of them: tables, windows, percentiles, padding.

All of it maps one stored value to one shown value, so it is computed once for every value that occurs (65,536
at the most), with how often each does.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_windowing

from shards.dicom_header import integer_of, text_of
from shards.images import WINDOW_PERCENTILES

#: How stored values become grey levels. auto: the file's own table or window, else percentiles. max: 0 is
#: black and the greatest value white (GLoRIA, MGCA). equalize: full range, then histogram equalisation (as
#: the images of MIMIC-CXR-JPG were made; MedKLIP and LoVT do it to RSNA).
Window = Literal["auto", "max", "equalize"]

#: A window with less than this share of the film's pixels inside belongs to another bit depth.
LEAST_INSIDE = 0.01
#: So does one that shows nearly all of them in fewer grey levels, where percentiles would show more.
FEWEST_LEVELS = 32
_NEARLY_ALL = 0.99
#: So does one from 0 to all that so many bits can hold, which nobody chose for a film, where most pixels lie
#: beyond it, or all that the file's own bits can hold has less than this share of the grey levels.
_DEPTHS = range(8, 17)
_LEAST_REACHED = 0.4  # half is one bit too many, a quarter are two
_NEAR = 2  # 127/255, 128/256 and 127.5/254 all mean 8 bits

#: Values that occur [V] and how often each does; from them every step is computed.
Values = NDArray[np.float64]
Counts = NDArray[np.int64]


class Shown(NamedTuple):
    """Values as they are shown.

    Attributes:
        values: [V] in [0, 1].
        ignored: whether the file has a table or window that does not fit its pixels.
    """

    values: Values
    ignored: bool = False


def show(values: Values, counts: Counts, header: Any, window: Window) -> Shown:
    """Values behind the modality step to shown ones, before the polarity."""
    if window == "auto":
        return _auto(values, counts, header)
    least, greatest = _range(values, counts)
    return Shown(_stretched(values, 0.0 if window == "max" else least, greatest))


def modality(values: NDArray[np.int64], header: Any) -> Values:
    """Stored values to those the window is meant for: a table, or slope and intercept."""
    if header.get("ModalityLUTSequence"):
        return _look_up(values.astype(np.float64), header.ModalityLUTSequence[0])
    slope, intercept = (_decimal(header, name) for name in ("RescaleSlope", "RescaleIntercept"))
    return values.astype(np.float64) * (slope or 1.0) + (intercept or 0.0)


def _auto(values: Values, counts: Counts, header: Any) -> Shown:
    """The file's table, else its first window, where it fits; else percentiles (of more than 8 bits)."""
    film = _without_padding(values, counts, header)
    held = _held(header)
    plain = _by_percentiles(values, film) if header.BitsStored > 8 else _stretched(values, *held)
    ignored = False
    for everything, low, high in _of_the_file(np.append(values, np.linspace(*held, 256)), header):
        shown, reached = everything[: len(values)], float(np.ptp(everything[len(values) :]))
        if _fits(shown, low, high, values, film, plain, reached):
            return Shown(shown, ignored)
        ignored = True
    return Shown(plain, ignored)


def _of_the_file(values: Values, header: Any) -> Iterator[tuple[Values, float, float]]:
    """What the file's table and window make of values, each with the values it is made for."""
    if header.get("VOILUTSequence"):
        item = header.VOILUTSequence[0]
        entries, first, bits = (int(number) for number in item.LUTDescriptor)
        shown = _stretched(_look_up(values, item), 0.0, float((1 << bits) - 1))
        first -= 65536 if first > 32767 and values.min() < 0 else 0
        yield shown, first, first + (entries or 65536) - 1
    center, width = (_decimal(header, name) for name in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None and width > 1:
        shown = _windowed(values, center, width, text_of(header, "VOILUTFunction"))
        yield shown, center - width / 2, center + width / 2


def _fits(
    shown: Values, low: float, high: float, values: Values, film: Counts, plain: Values, reached: float
) -> bool:
    """Whether what is made for values from `low` to `high` fits the pixels of a film.

    Windows of another bit depth leave films white, black or with a few grey levels. That one is narrow is no
    sign of it: anatomy may take a tenth of the values of a detector.

    Args:
        shown: what is made. values, film: those there are, and how often each is in the film.
        plain: what is shown instead. reached: share of the grey levels for all that the file's bits can hold.
    """
    beyond = film[values < low].sum(), film[values > high].sum()
    if sum(beyond) > (1 - LEAST_INSIDE) * film.sum():
        return False
    is_of_depth = abs(low) <= _NEAR and any(abs(high - (1 << bits)) <= _NEAR for bits in _DEPTHS)
    if is_of_depth and (max(beyond) > film.sum() / 2 or reached < _LEAST_REACHED):
        return False
    levels, at_best = _levels(shown, film), _levels(plain, film)
    return not (levels < FEWEST_LEVELS <= at_best or levels == 1 < at_best)


def _levels(shown: Values, film: Counts) -> int:
    """How many of 256 grey levels hold nearly all pixels of a film."""
    held = np.cumsum(np.sort(np.bincount(np.rint(shown * 255).astype(np.int64), film))[::-1])
    return int(np.searchsorted(held, _NEARLY_ALL * held[-1])) + 1


def _held(header: Any) -> tuple[float, float]:
    """Least and greatest value that the stored bits can hold; the slope of a rescale may be negative."""
    count, signed = 1 << header.BitsStored, header.PixelRepresentation == 1
    first = -count // 2 if signed else 0
    values = modality(np.arange(first, first + count), header)
    return float(values.min()), float(values.max())


def _windowed(values: Values, center: float, width: float, function: str) -> Values:
    """The standard's LINEAR, LINEAR_EXACT or SIGMOID, by pydicom on a header made for it."""
    window = pydicom.Dataset()
    window.PhotometricInterpretation, window.PixelRepresentation = "MONOCHROME2", 0
    window.BitsStored, window.WindowCenter, window.WindowWidth = 16, center, width
    if function.upper() in ("LINEAR_EXACT", "SIGMOID"):
        window.VOILUTFunction = function.upper()
    return _stretched(apply_windowing(values, window), 0.0, 65535.0)


def _by_percentiles(values: Values, counts: Counts) -> Values:
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


def _without_padding(values: Values, counts: Counts, header: Any) -> Counts:
    """Counts without the values that fill what the detector has not seen, if anything is left."""
    kept = np.where(is_padding(values, header), 0, counts)
    return kept if kept.any() else counts


def is_padding(values: Values, header: Any) -> NDArray[np.bool_]:
    """Which values fill what the detector has not seen: one, or a range whose ends come in any order."""
    padding, limit = (integer_of(header, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if padding is None:
        return np.zeros(len(values), dtype=np.bool_)
    low, high = sorted(modality(np.array([padding, padding if limit is None else limit]), header))
    return np.asarray((values >= low - 1e-6) & (values <= high + 1e-6))


def _look_up(values: Values, item: Any) -> Values:
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


def _range(values: Values, counts: Counts) -> tuple[float, float]:
    present = values[counts > 0]
    return float(present.min()), float(present.max())


def _stretched(values: Values, low: float, high: float) -> Values:
    return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


def _decimal(header: Any, name: str) -> float | None:
    """The first of one or several numbers; None where there is none, or it is not finite."""
    value = header.get(name)
    if value is None or value == "":
        return None
    try:
        found = float(value[0] if isinstance(value, (list, pydicom.multival.MultiValue)) else value)
    except (TypeError, ValueError, IndexError):
        return None
    return found if np.isfinite(found) else None

"""A film of rising values, read back as grey levels, for the tests of DICOM."""

from __future__ import annotations

from typing import Any

import numpy as np

from shards.dicom import read_dicom

#: Asymmetric in both directions, so that a transposed, flipped or shifted result differs.
RAMP = (np.arange(48 * 64).reshape(48, 64) * 4095 // (48 * 64 - 1)).astype(np.uint16)


def linear(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """The LINEAR window of PS3.3 C.11.2.1.2 with 0..255 as its range, written out independently."""
    values = values.astype(np.float64)
    shown = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    shown[values <= center - 0.5 - (width - 1) / 2] = 0
    shown[values > center - 0.5 + (width - 1) / 2] = 255
    return shown


def close(found: np.ndarray, expected: np.ndarray, levels: float = 1.0) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(float) - expected).max() <= levels


def read(data: bytes, **options: Any) -> np.ndarray:
    return read_dicom(data, **options).pixels

"""Pictures inside the page."""

from __future__ import annotations

import base64

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.images import encode_jpeg

#: Side of a picture on the page in pixels.
SIDE = 224


def data_url(pixels: NDArray[np.uint8], side: int = SIDE) -> str:
    """A data URL of a JPEG of pixels [H, W] or [H, W, 3] whose longer side is `side`."""
    scale = side / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = np.asarray(
        cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    )
    if small.ndim == 2:
        data = encode_jpeg(small.astype(np.uint8), 85)
    else:
        data = cv2.imencode(".jpg", np.ascontiguousarray(small[:, :, ::-1]))[1].tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()

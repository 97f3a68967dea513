"""Where findings are seen, drawn over the images."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from medvlp.library.model import Model
from shards.atomic import atomic_folder
from shards.errors import DataError
from shards.progress import tracked


def write_overlays(model: Model, images: Sequence[Path], findings: Sequence[str], folder: Path) -> None:
    """Write `0000-film-effusion.png` for every image and finding into a new folder, all of them or nothing.

    Raises:
        DataError: the folder cannot be written.
        UsageError: the method gives no maps.
    """
    try:
        with atomic_folder(folder) as partial:
            for number, image in enumerate(tracked(images, "drawing maps of images", len(images))):
                for finding in findings:
                    overlay = model.ground(image, finding).overlay()
                    name = f"{number:04d}-{_plain(image.stem)}-{_plain(finding)}.png"
                    written, data = cv2.imencode(".png", np.ascontiguousarray(overlay[:, :, ::-1]))
                    assert written, "PNG takes every 8-bit image"
                    (partial / name).write_bytes(data.tobytes())
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)[:60]

"""A study as it is stored: its image fitted into a square, boxes and masks with it, and its metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format import MASKS_EXTENSION, METADATA_EXTENSION
from shards.images import encode_jpeg, encode_png, fit_square, fit_square_mask
from shards.masks import encode_masks
from shards.metadata import METADATA_LIMIT, metadata_bytes, metadata_problems, to_metadata
from shards.sources.base import RejectedRecord
from shards.study import Box, Study
from shards.writer import Sample


@dataclass(frozen=True)
class StoredImage:
    """How images are stored: side of the square in pixels, "jpg" or "png", and JPEG quality (1 to 100)."""

    size: int = 256
    format: str = "jpg"
    quality: int = 90

    def __post_init__(self) -> None:
        if self.size < 1 or self.format not in ("jpg", "png") or not 1 <= self.quality <= 100:
            raise ValueError(f"cannot store images as {self}")


def to_sample(study: Study, key: str, stored: StoredImage, notes: Counter[str] | None = None) -> Sample:
    """Fit image, boxes and masks into the stored square and encode all members.

    Boxes are cut at the border of the image; those without area in it are left out, and phrases with their
    last box.

    Args:
        study: as its source gives it. key: of the sample. stored: how the image is stored.
        notes: counts the boxes that are cut and left out, where given.

    Raises:
        RejectedRecord: the text cannot be stored as UTF-8 or is too long, or the masks have too many pixels.
        ValueError: the source gives what no sample may hold.
    """
    image, scale, left, top = fit_square(study.image, stored.size)
    fit = _BoxFit(
        study.image.shape[1], study.image.shape[0], scale, left, top, Counter() if notes is None else notes
    )
    phrases = [replace(phrase, boxes=tuple(fit.boxes(phrase.boxes))) for phrase in study.phrases]
    study = replace(
        study,
        boxes=fit.boxes(study.boxes),
        anatomy=fit.boxes(study.anatomy),
        phrases=[
            fitted
            for fitted, given in zip(phrases, study.phrases, strict=True)
            if fitted.boxes or not given.boxes
        ],
    )
    metadata = to_metadata(study)
    if problems := metadata_problems(metadata, [*study.labels, *study.masks]):
        raise ValueError(f"the source gives a study that cannot be stored: {'; '.join(problems)}")
    encoded = encode_jpeg(image, stored.quality) if stored.format == "jpg" else encode_png(image)
    members = {stored.format: encoded}
    try:
        members[METADATA_EXTENSION] = metadata_bytes(metadata)
    except UnicodeEncodeError:
        raise RejectedRecord("text holds characters that are not Unicode") from None
    if (size := len(members[METADATA_EXTENSION])) > METADATA_LIMIT:
        raise RejectedRecord(
            f"text and targets take {size:,} bytes, more than the {METADATA_LIMIT:,} of a sample"
        )
    if study.masks:
        masks = [_fit_mask(name, mask, study.image.shape, stored.size) for name, mask in study.masks.items()]
        try:
            members[MASKS_EXTENSION] = encode_masks(masks)
        except DataError as error:
            raise RejectedRecord(str(error)) from error
    return Sample(key, members)


def _fit_mask(name: str, mask: NDArray[np.uint8], shape: tuple[int, ...], size: int) -> NDArray[np.uint8]:
    if mask.shape != shape or mask.dtype != np.uint8 or mask.max(initial=0) > 1:
        raise ValueError(f"mask of {name!r} is not uint8 of 0 and 1 in the shape of the image")
    return fit_square_mask(mask, size)


@dataclass(frozen=True)
class _BoxFit:
    """Cuts boxes at the border of an image of `width` x `height` pixels and moves them with it."""

    width: int
    height: int
    scale: float
    left: int
    top: int
    notes: Counter[str]

    def boxes(self, boxes: Iterable[Box]) -> list[Box]:
        """The boxes as they are stored; those outside the image are missing."""
        fitted = []
        for box in boxes:
            if not np.isfinite((box.x, box.y, box.width, box.height)).all():
                raise ValueError("the source gives a box that is not of finite numbers")
            x, y = max(box.x, 0.0), max(box.y, 0.0)
            width = min(box.width + min(box.x, 0.0), self.width - x)
            height = min(box.height + min(box.y, 0.0), self.height - y)
            if width <= 0 or height <= 0:
                self.notes["boxes without area in their image were left out"] += 1
                continue
            if (x, y, width, height) != (box.x, box.y, box.width, box.height):
                self.notes["boxes were cut at the border of their image"] += 1
            place = (x * self.scale + self.left, y * self.scale + self.top)
            size = (width * self.scale, height * self.scale)
            fitted.append(Box(box.label, *place, *size, box.side, box.reader))
        return fitted

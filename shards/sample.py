"""A study as it is stored: its image fitted into a square, boxes and mask with it, and its metadata."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shards.format import MASK_EXTENSION, METADATA_EXTENSION
from shards.images import encode_jpeg, encode_png, fit_square, fit_square_mask
from shards.metadata import metadata_bytes, to_metadata
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


def to_sample(study: Study, key: str, stored: StoredImage) -> Sample:
    """Fit image, boxes and mask into the stored square and encode all members.

    Raises:
        RejectedRecord: the text cannot be stored as UTF-8.
    """
    image, scale, left, top = fit_square(study.image, stored.size)
    study = replace(study, boxes=[_fit_box(box, scale, left, top) for box in study.boxes])
    encoded = encode_jpeg(image, stored.quality) if stored.format == "jpg" else encode_png(image)
    members = {stored.format: encoded}
    try:
        members[METADATA_EXTENSION] = metadata_bytes(to_metadata(study))
    except UnicodeEncodeError:
        raise RejectedRecord("text holds characters that are not Unicode") from None
    if study.mask is not None:
        members[MASK_EXTENSION] = encode_png(fit_square_mask(study.mask, stored.size))
    return Sample(key, members)


def _fit_box(box: Box, scale: float, left: int, top: int) -> Box:
    return Box(box.label, box.x * scale + left, box.y * scale + top, box.width * scale, box.height * scale)

"""Source: object-CXR, films with foreign objects as rectangles, ellipses and polygons."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.archives.files import ArchiveFiles
from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.errors import UsageError
from shards.images import decode_image
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Box, Study

OBJECT = "Foreign Object"
_PARTS = ("train", "dev", "test")
_SIZES = {"train": 8_000, "dev": 1_000, "test": 1_000}
_RECTANGLE, _ELLIPSE, _POLYGON = "0", "1", "2"
#: Larger coordinates are no places in a film, and would overflow where shapes are drawn.
_FARTHEST = 32_767


@dataclass(frozen=True, kw_only=True)
class ObjectCxrOptions(ArchiveOptions):
    """Options of `medvlp shards build object-cxr`."""

    dev: Literal["valid", "test"] = option(
        "split of the dev films: test, as in most publications, if the test films have no annotations",
        "valid",
    )


@register("object-cxr", ObjectCxrOptions)
def open_object_cxr(options: ObjectCxrOptions, image_size: int) -> ObjectCxrSource:
    """Build from object-CXR: films, a box for each foreign object, one mask of all."""
    return ObjectCxrSource(options)


class ObjectCxrSource(ArchiveSource):
    """One film a record. A film without objects has a mask of zeros: it was looked at."""

    name = "object-cxr"
    facts = Facts(
        title="object-CXR",
        license="object-CXR terms (JF Healthcare): research, non-commercial",
        access="free",
        origin="its mirrors at archive.org and Kaggle (search for object-CXR); the first links are dead",
    )
    options: ObjectCxrOptions

    def prepare(self) -> None:
        """Parts that are there, and their published numbers."""
        self.label_names = [OBJECT]
        self._splits = {"train": "train", "dev": self.options.dev}
        if self.files.find("test.csv", or_gzip=True) is not None:  # published later than the rest
            if self.options.dev == "test":
                raise UsageError("test.csv is there, so the dev films are no test split: leave --dev out")
            self._splits["test"] = "test"
        for part, split in self._splits.items():
            self.published[split] = _SIZES[part]
            self.published[f"{split} films with objects"] = _SIZES[part] // 2
        self._zips = self._part_zips()

    def records(self) -> Iterator[Record]:
        """Every film of every part."""
        for part, split in self._splits.items():
            for record in self.texts.table(f"{part}.csv", columns=["image_name", "annotation"]):
                if not record.problem:
                    record.cells["part"] = part
                    self.found[f"{split} films with objects"] += bool(record["annotation"])
                yield record

    def identify(self, record: Record) -> Identity:
        """Nothing is known of patients: each film counts as one. Names may recur in another part."""
        image = f"{record['part']}/{record.text('image_name')}"
        return Identity(image, image, record["image_name"], self._splits[record["part"]])

    def list_id(self, text: str) -> str:
        """As the base has it, with the part where it is written ("train/00077.jpg", "00077.jpg")."""
        part = text.strip().replace("\\", "/").rpartition("/")[0].rpartition("/")[2]
        return f"{part}/{super().list_id(text)}" if part in _PARTS else super().list_id(text)

    def studies(self, record: Record) -> list[Study]:
        """The film with its objects."""
        image = self._film(record["part"], record["image_name"])
        try:
            shapes = parse_shapes(record["annotation"])
        except ValueError as error:
            raise record.error(f"column 'annotation': {error}") from None
        study = f"{record['part']}/{record['image_name']}"
        mask = np.zeros(image.shape, dtype=np.uint8)
        for shape in shapes:
            shape.draw(mask)
        return [
            Study(
                study_id=study,
                patient_id=study,
                image=image,
                labels={OBJECT: int(bool(shapes))},
                boxes=[shape.box() for shape in shapes],
                masks={OBJECT: mask},
            )
        ]

    def _film(self, part: str, name: str) -> NDArray[np.uint8]:
        """A film of that part only: the parts may have films of the same name."""
        path = f"{part}/{name}"
        if self.files.find(path) is None and part in self._zips:
            return decode_image(self._zips[part].read(name), placed=True)
        return self.image(path, placed=True)

    def _part_zips(self) -> dict[str, ArchiveFiles]:
        """Zips of the parts, which hold films without a folder in some copies."""
        root = self.options.root
        zips = {part: root / f"{part}.zip" for part in _PARTS} if root.is_dir() else {}
        return {part: self.open(path).files for part, path in zips.items() if path.is_file()}


@dataclass(frozen=True)
class Shape:
    """An object: kind as the table writes it, points [n, 2] in pixels (two corners, or a polygon's)."""

    kind: str
    points: NDArray[np.float64]

    def box(self) -> Box:
        """The box around it."""
        (left, top), (right, bottom) = self.points.min(axis=0).tolist(), self.points.max(axis=0).tolist()
        return Box(OBJECT, left, top, right - left, bottom - top)

    def draw(self, mask: NDArray[np.uint8]) -> None:
        """Set the pixels inside it, its edge included, to 1."""
        points = np.rint(self.points).astype(np.int32)
        low, high = points.min(axis=0), points.max(axis=0)
        if self.kind == _RECTANGLE:
            cv2.rectangle(mask, low.tolist(), high.tolist(), 1, cv2.FILLED)
        elif self.kind == _ELLIPSE:
            center, axes = (self.points.min(axis=0) + self.points.max(axis=0)) / 2, high - low
            cv2.ellipse(mask, (center.tolist(), axes.tolist(), 0.0), 1, cv2.FILLED)
        else:
            cv2.fillPoly(mask, [points], 1)


def parse_shapes(text: str) -> list[Shape]:
    """Shapes joined by ";", each "kind x1 y1 x2 y2 ..."; "" is none.

    Raises:
        ValueError: it is not of that form.
    """
    return [_shape(part.split()) for part in text.split(";") if part.strip()]


def _shape(words: list[str]) -> Shape:
    kind, numbers = words[0], words[1:]
    if kind not in (_RECTANGLE, _ELLIPSE, _POLYGON):
        raise ValueError("a shape is none of 0 (rectangle), 1 (ellipse) and 2 (polygon)")
    if kind == _POLYGON:
        if len(numbers) < 6 or len(numbers) % 2:
            raise ValueError("a polygon has not an x and a y for each of three points or more")
    elif len(numbers) != 4:
        raise ValueError("a rectangle or an ellipse has not four coordinates")
    try:
        places = [float(number) for number in numbers]
    except ValueError:
        raise ValueError("a coordinate is no number") from None
    if not all(math.isfinite(place) and abs(place) <= _FARTHEST for place in places):
        raise ValueError("a coordinate is no place in a film")
    return Shape(kind, np.array(places).reshape(-1, 2))

"""Source: SIIM-ACR Pneumothorax, 12,047 films with masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.dicom import Window, read_dicom
from shards.errors import DataError
from shards.images import fit_square_mask
from shards.masks import decode_runs
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Study

FINDING = "Pneumothorax"
_NONE = "-1"
#: Side of the published films in pixels, in which masks are given.
_SIDE = 1024
#: Stage of the challenge -> rows, films, films with a pneumothorax.
_SIZES = {1: (11_582, 10_675, 2_379), 2: (12_954, 12_047, 2_669)}


@dataclass(frozen=True, kw_only=True)
class SiimOptions(ArchiveOptions):
    """Options of `medvlp shards build siim`."""

    window: Window = option("DICOM values to grey levels", "auto")
    stage: int = option("of the challenge, which decides the published numbers", 2, least=1, most=2)


@register("siim", SiimOptions)
def open_siim(options: SiimOptions, image_size: int) -> SiimSource:
    """Build from SIIM-ACR Pneumothorax: films and masks; no official split."""
    return SiimSource(options)


class SiimSource(ArchiveSource):
    """One film a record. A film without pneumothorax has a mask of zeros: it was looked at."""

    name = "siim"
    facts = Facts(
        title="SIIM-ACR Pneumothorax",
        license="Kaggle competition rules of SIIM-ACR Pneumothorax Segmentation: non-commercial research",
        access="free after registration",
        origin="https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation",
    )
    options: SiimOptions

    def prepare(self) -> None:
        """Published numbers of the stage."""
        self.label_names = [FINDING]
        rows, films, positive = _SIZES[self.options.stage]
        self.published = {"all": films, "rows": rows, "films with pneumothorax": positive}
        self._without_rows = 0

    def records(self) -> Iterator[Record]:
        """Every film of the table once, with its rows: each holds a part of the mask."""
        # The names of the columns are "ImageId" and " EncodedPixels".
        rows = self.texts.table("train-rle.csv", "stage_2_train.csv", columns=["ImageId", "EncodedPixels"])
        join = self.join()
        join.add("rows", rows, key="ImageId")
        paths = self._paths()
        seen: set[str] = set()
        for record in join.records(rows, rows="ImageId"):
            self.found["rows"] += 1
            image = record["ImageId"]  # of every row: the join has refused others
            if image in seen:
                continue
            seen.add(image)
            record.cells["paths"] = "\n".join(paths.pop(image, []))
            self.found["films with pneumothorax"] += any(
                row["EncodedPixels"] != _NONE for row in record.joined["rows"]
            )
            yield record
        self._without_rows = len(paths)

    def identify(self, record: Record) -> Identity:
        """Nothing is known of patients: the header's PatientID is another for each film."""
        image = record["ImageId"]
        return Identity(image, image, image)

    def studies(self, record: Record) -> list[Study]:
        """The film with its mask."""
        image = record["ImageId"]
        paths = [path for path in record["paths"].split("\n") if path]
        if len(paths) != 1:
            raise record.error(f"{len(paths) or 'no'} DICOM files are named after the film")
        film = read_dicom(self.files.read(paths[0]), self.options.window)
        if film.image_uid != image:
            raise record.error("the DICOM file of that name is another's by its SOPInstanceUID")
        height, width = film.pixels.shape
        if height != width:
            raise record.error(f"masks are of {_SIDE} x {_SIDE} pixels, and the film is not square")
        mask = _mask(record)
        return [
            Study(
                study_id=image,
                patient_id=image,
                image=film.pixels,
                view=film.view,
                labels={FINDING: int(mask.any())},
                masks={FINDING: fit_square_mask(mask, width)},
            )
        ]

    def remarks(self) -> list[str]:
        """As the base has it, and what a user should know of patients and of films without rows."""
        lines = ["each film counts as a patient of its own, so a patient may be in two splits: none is named"]
        if self._without_rows:
            lines.append(f"{self._without_rows:,} DICOM files have no row in the table and were left out")
        return super().remarks() + lines

    def _paths(self) -> dict[str, list[str]]:
        """Name of a film -> its files: the folders above are named after series, which no table has."""
        paths: dict[str, list[str]] = {}
        for path in self.files.names(".dcm"):
            name = path.replace("\\", "/").rpartition("/")[2][: -len(".dcm")]
            paths.setdefault(name, []).append(path)
        return paths


def _mask(record: Record) -> NDArray[np.uint8]:
    """All rows of a film over each other."""
    rows = record.joined["rows"]
    negative = sum(row["EncodedPixels"] == _NONE for row in rows)
    if negative not in (0, len(rows)):
        raise record.error("one row says that there is no pneumothorax, another has one")
    mask = np.zeros((_SIDE, _SIDE), dtype=np.uint8)
    for row in rows if not negative else []:
        try:
            mask |= decode_runs(row["EncodedPixels"], _SIDE, _SIDE, "relative")
        except DataError as error:
            raise row.error(f"column 'EncodedPixels': {error}") from None
    return mask

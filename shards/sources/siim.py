"""Source: SIIM-ACR Pneumothorax, 12,047 films with masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.archives.files import read_member
from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.dicom import read_dicom
from shards.dicom_windows import Window
from shards.errors import DataError, UsageError
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
#: Pixels of a mask above this are inside.
_HALF = 127
_TABLES = ("train-rle.csv", "stage_2_train.csv")
#: Tables of the copy at Kaggle that has films and masks as PNG, by split.
_PNG_TABLES = {"train": "stage_1_train_images.csv", "test": "stage_1_test_images.csv"}
_PNG_SIZES = {"train": 10_675, "test": 1_372}


@dataclass(frozen=True, kw_only=True)
class SiimOptions(ArchiveOptions):
    """Options of `medvlp shards build siim`."""

    window: Window = option("DICOM values to grey levels", "auto")
    stage: int | None = option(
        "of the challenge, which decides the published numbers; default: 2", None, least=1, most=2
    )


@register("siim", SiimOptions)
def open_siim(options: SiimOptions, image_size: int) -> SiimSource:
    """Build from SIIM-ACR Pneumothorax (DICOM and run lengths, or Kaggle's PNG copy): films and masks."""
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
    reading = 3

    def prepare(self) -> None:
        """Which files these are, and their published numbers."""
        self.label_names = [FINDING]
        rows, films, positive = _SIZES[self.options.stage or 2]
        self._without_rows = 0
        self._png = not self._has(_TABLES) and self._has(_PNG_TABLES.values())
        if self._png:
            if self.options.window != "auto":
                raise UsageError("--window is of DICOM files; Kaggle's PNG copy has grey levels")
            if self.options.stage is not None:
                raise UsageError("--stage is of the DICOM files; Kaggle's PNG copy has numbers of its own")
            self.published = {**_PNG_SIZES, "films with pneumothorax": _SIZES[2][2]}
        else:
            self.published = {"all": films, "rows": rows, "films with pneumothorax": positive}

    def records(self) -> Iterator[Record]:
        """Every film once, with its rows of run lengths: each holds a part of the mask."""
        if self._png:
            yield from self._png_records()
            return
        # The names of the columns are "ImageId" and " EncodedPixels".
        rows = self.texts.table(*_TABLES, columns=["ImageId", "EncodedPixels"])
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
        image = record.text("ImageId")
        return Identity(image, image, image, record.cells.get("split"))

    def studies(self, record: Record) -> list[Study]:
        """The film with its mask."""
        if self._png:
            return [self._png_study(record)]
        image = record["ImageId"]
        paths = [path for path in record["paths"].split("\n") if path]
        if len(paths) != 1:
            raise record.error(f"{len(paths) or 'no'} DICOM files are named after the film")
        film = read_dicom(read_member(self.files.listed(paths[0])), self.options.window, turn=False)
        if film.image_uid != image:
            raise record.error("the DICOM file of that name is another's by its SOPInstanceUID")
        height, width = film.pixels.shape
        if height != width:
            raise record.error(f"masks are of {_SIDE} x {_SIDE} pixels, and the film is not square")
        self.notes.update(film.notes)
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

    def _has(self, names: Iterable[str]) -> bool:
        return any(self.files.find(name, or_gzip=True) is not None for name in names)

    def _png_records(self) -> Iterator[Record]:
        for split, name in _PNG_TABLES.items():
            for record in self.texts.table(name, columns=["new_filename", "filename", "has_pneumo"]):
                if not record.problem:
                    self.found["films with pneumothorax"] += record["has_pneumo"] in ("1", "1.0")
                    record.cells["ImageId"] = self.list_id(record["filename"])
                    record.cells["split"] = split
                yield record

    def _png_study(self, record: Record) -> Study:
        """Film and mask have one name, which holds the label and is therefore not kept."""
        name = record.text("new_filename")
        image, mask = (self.image(f"{folder}/{name}", placed=True) for folder in ("png_images", "png_masks"))
        if image.shape != mask.shape:
            raise record.error("film and mask are not of one size")
        inside = (mask > _HALF).astype(np.uint8)
        label = record.label("has_pneumo")
        if label != int(inside.any()):
            raise record.error("column 'has_pneumo' and the mask contradict each other")
        study = record["ImageId"]
        return Study(study, study, image, labels={FINDING: label}, masks={FINDING: inside})

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

"""Source: MS-CXR, phrases of radiologists with boxes on images of MIMIC-CXR-JPG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.archives import mimic
from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.images import decode_image
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Study

CATEGORIES = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Lung Opacity", "Pleural Effusion", "Pneumonia",
    "Pneumothorax",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MsCxrOptions(ArchiveOptions):
    """Options of `medvlp shards build ms-cxr`."""

    images: Path = option("folder of MIMIC-CXR-JPG")


@register("ms-cxr", MsCxrOptions)
def open_ms_cxr(options: MsCxrOptions, image_size: int) -> MsCxrSource:
    """Build from MS-CXR: phrases with boxes on images of MIMIC-CXR-JPG, for grounding."""
    return MsCxrSource(options)


class MsCxrSource(ArchiveSource):
    """One image a record. Its boxes stand both with their phrases and, by category, as boxes of findings.

    Version 0.1 has no splits: all of it is for testing. Its images lie in all splits of MIMIC-CXR.
    """

    name = "ms-cxr"
    facts = Facts("MS-CXR", mimic.LICENSE, mimic.ACCESS, mimic.MS_CXR_ORIGIN)
    options: MsCxrOptions

    def prepare(self) -> None:
        """The table of boxes, and the folder of images."""
        self.label_names = list(CATEGORIES)
        self.published = {"phrases": mimic.MS_CXR_PHRASES}
        self._boxes = mimic.ms_cxr_table(self.texts)
        self._images = self.open(self.options.images, mimic.JPG_ORIGIN)

    def records(self) -> Iterator[Record]:
        """The first row of every image, with all rows that are about it."""
        join = self.join()
        join.add("boxes", self._boxes, key="dicom_id")
        views = self._views()
        seen: set[str] = set()
        first = (row for row in self._boxes if row["dicom_id"] not in seen)
        for record in join.records(first, boxes="dicom_id"):
            seen.add(record["dicom_id"])
            self.found["phrases"] += len({row["label_text"] for row in record.joined["boxes"]})
            record.cells["view"] = views.get(record["dicom_id"], "")
            yield record

    def identify(self, record: Record) -> Identity:
        """Patient and study of the path; the split of version 1.1.0, else "test"."""
        subject, study, dicom = mimic.ms_cxr_place(record)
        if dicom != record["dicom_id"]:
            raise record.error("columns 'dicom_id' and 'path' are about two images")
        split = record.split("split") if record["split"] else "test"
        return Identity(subject, dicom, study, split)

    def list_id(self, text: str) -> str:
        """An image by its DICOM id, a patient or study by its number, with or without "p" and "s"."""
        return mimic.bare_number(super().list_id(text))

    def studies(self, record: Record) -> list[Study]:
        """The image with its phrases and boxes."""
        subject, study, dicom = mimic.ms_cxr_place(record)
        data = self._images.files.read(mimic.image_path(subject, study, dicom))
        image = decode_image(data, placed=True)
        phrases = mimic.phrases(record.joined["boxes"], image.shape)
        boxes = [box for phrase in phrases for box in phrase.boxes]
        unknown = {box.label for box in boxes} - set(CATEGORIES)
        if unknown:
            raise record.error("column 'category_name' holds none of the eight categories")
        return [
            Study(
                study_id=study,
                patient_id=subject,
                image=image,
                view=record["view"],
                labels={name: 1 if any(box.label == name for box in boxes) else None for name in CATEGORIES},
                boxes=boxes,
                phrases=phrases,
            )
        ]

    def _views(self) -> dict[str, str]:
        """Views of the set's images, where the images' table is there."""
        metadata = "mimic-cxr-2.0.0-metadata.csv"
        if self._images.files.find(metadata, or_gzip=True) is None:
            return {}
        wanted = {row["dicom_id"] for row in self._boxes}
        table = self._images.table(metadata, columns=["dicom_id", "ViewPosition"])
        return {
            row["dicom_id"]: row["ViewPosition"].upper()
            for row in table
            if not row.problem and row["dicom_id"] in wanted
        }

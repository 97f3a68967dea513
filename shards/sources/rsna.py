"""Source: RSNA Pneumonia Detection Challenge (Kaggle, stage 2), 26,684 films with boxes of lung opacity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.dicom import read_dicom
from shards.dicom_windows import Window
from shards.errors import DataError
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Box, Study

_OPACITY, _NORMAL, _OTHER = "Lung Opacity", "Normal", "No Lung Opacity / Not Normal"
_BOX = ("x", "y", "width", "height")
#: Side of the published films in pixels, in which boxes are given.
_SIDE = 1024
_MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
_MAPPING_ORIGIN = (
    "https://www.rsna.org/rsnai/ai-image-challenge/rsna-pneumonia-detection-challenge-2018 (mapping to NIH)"
)


@dataclass(frozen=True, kw_only=True)
class RsnaOptions(ArchiveOptions):
    """Options of `medvlp shards build rsna`."""

    window: Window = option("DICOM values to grey levels", "auto")
    mapping: Path | None = option(f"{_MAPPING}, which names the NIH patients; default: that in --root", None)


@register("rsna", RsnaOptions)
def open_rsna(options: RsnaOptions, image_size: int) -> RsnaSource:
    """Build from RSNA Pneumonia, stage 2: films, pneumonia or not, boxes; no official split."""
    return RsnaSource(options)


class RsnaSource(ArchiveSource):
    """One film a record: "Pneumonia" is the table's Target, "Normal" the class of that name."""

    name = "rsna"
    facts = Facts(
        title="RSNA Pneumonia Detection Challenge",
        license="Kaggle competition rules of the RSNA Pneumonia Detection Challenge: research",
        access="free after registration",
        origin="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data",
    )
    options: RsnaOptions
    reading = 4
    identifying = ("nih_image",)

    def prepare(self) -> None:
        """Labels, published numbers, and the patients where they are known."""
        self.label_names = ["Pneumonia", "Normal"]
        self.published = {
            "all": 26_684, "label rows": 30_227, "boxes": 9_555,
            _OPACITY: 6_012, _NORMAL: 8_851, _OTHER: 11_821,
        }  # fmt: skip
        self._mapped = True

    def records(self) -> Iterator[Record]:
        """Every film once, with its rows of both tables: each has one for every box."""
        rows = self.texts.table("stage_2_train_labels.csv", columns=["patientId", *_BOX, "Target"])
        classes = self.texts.table("stage_2_detailed_class_info.csv", columns=["patientId", "class"])
        join = self.join()
        join.add("rows", rows, key="patientId")
        join.add("classes", classes, key="patientId")
        originals = self._originals()
        self._mapped = originals is not None
        seen: set[str] = set()
        for record in join.records(rows, rows="patientId", classes="patientId"):
            self.found["label rows"] += 1
            image = record["patientId"]  # of every row: the join has refused others
            if image in seen:
                continue
            seen.add(image)
            record.cells["original"] = (originals or {}).get(image, "")
            for name in {row["class"] for row in record.joined["classes"]}:
                self.found[name] += 1
            self.found["boxes"] += sum(row["Target"] == "1" for row in record.joined["rows"])
            yield record

    def identify(self, record: Record) -> Identity:
        """The patient is NIH's where the mapping is there; else each film is a patient."""
        image, original = record["patientId"], record["original"]
        if not self._mapped:
            return Identity(image, image, image)
        if not original:
            raise record.error(f"{_MAPPING} does not name the film")
        return Identity(_patient(original), image, original)

    def studies(self, record: Record) -> list[Study]:
        """The film with its labels and boxes."""
        image, original = record["patientId"], record["original"]
        finding = _class(record)
        film = read_dicom(
            self.files.read(f"stage_2_train_images/{image}.dcm"), self.options.window, turn=False
        )
        if film.patient_id != image:
            raise record.error("the DICOM file of that name is another's by its PatientID")
        self.notes.update(film.notes)
        height, width = film.pixels.shape
        boxes = [
            _scaled(row.box("Pneumonia", *_BOX), width / _SIDE, height / _SIDE)
            for row in record.joined["rows"]
            if finding == _OPACITY
        ]
        return [
            Study(
                study_id=image,
                patient_id=_patient(original) if original else image,
                image=film.pixels,
                view=film.view,
                labels={"Pneumonia": int(finding == _OPACITY), "Normal": int(finding == _NORMAL)},
                boxes=boxes,
                extra={"class": finding} | ({"nih_image": original} if original else {}),
            )
        ]

    def remarks(self) -> list[str]:
        """As the base has it, and that patients are not known where they are not."""
        unknown = (
            "each film counts as a patient of its own, so a patient may be in two splits: patientId names a "
            f"film. Patients are in {_MAPPING} (--mapping), from {_MAPPING_ORIGIN}"
        )
        return super().remarks() + ([] if self._mapped else [unknown])

    def _originals(self) -> dict[str, str] | None:
        """Film -> name of the NIH film that it was made of; None without the mapping."""
        if self.options.mapping is not None:
            folder, name = self.options.mapping.parent, self.options.mapping.name
            texts = self.open(folder, _MAPPING_ORIGIN, deep=False)
        elif self.files.find(_MAPPING, or_gzip=True) is not None:
            texts, name = self.texts, _MAPPING
        else:
            return None
        entries = texts.json(name)
        try:
            return {str(entry["subset_img_id"]): str(entry["img_id"]) for entry in entries}
        except (TypeError, KeyError):
            raise DataError(
                f"{name} is not a list of objects with 'subset_img_id' and 'img_id'; get it from "
                + _MAPPING_ORIGIN
            ) from None


def _patient(original: str) -> str:
    """NIH's patient number as `nih-cxr14` has it, of a name such as 00012345_000.png."""
    return original.partition("_")[0].lstrip("0")


def _class(record: Record) -> str:
    """The class of a film, on which all its rows must agree."""
    classes = {row["class"] for row in record.joined["classes"]}
    if len(classes) != 1 or not classes <= {_OPACITY, _NORMAL, _OTHER}:
        raise record.error("stage_2_detailed_class_info.csv gives it no class, an unknown one or several")
    name = classes.pop()
    for row in record.joined["rows"]:
        boxed = [bool(row[side]) for side in _BOX]
        if row["Target"] not in ("0", "1") or any(boxed) != all(boxed) or boxed[0] != (row["Target"] == "1"):
            raise row.error("a row with Target 1 has a box and one with Target 0 none; this has not")
        if boxed[0] != (name == _OPACITY):
            raise row.error("column 'Target' and stage_2_detailed_class_info.csv contradict each other")
    return name


def _scaled(box: Box, across: float, down: float) -> Box:
    """A box in pixels of the film as it is stored, which may be a smaller copy."""
    return Box(box.label, box.x * across, box.y * down, box.width * across, box.height * down)

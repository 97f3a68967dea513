"""Source: NIH ChestX-ray14, 112,120 films with text-mined labels and 984 boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shards.archives.id_lists import IdLists
from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.sources.registry import register
from shards.study import Box, LabelValue, Study

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
NO_FINDING = "No Finding"
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_BOXES = "BBox_List_2017.csv"
_BOX_COLUMNS = ("Bbox [x]", "Bbox [y]", "Bbox [w]", "Bbox [h]")
#: The boxes' names of findings that the labels call otherwise.
_BOX_NAMES = {"Infiltrate": "Infiltration"}
#: Side of the published films in pixels, in which boxes are given.
_SIDE = 1024
_OLDEST = 120


@dataclass(frozen=True, kw_only=True)
class NihOptions(ArchiveOptions):
    """Options of `medvlp shards build nih-cxr14`."""


@register("nih-cxr14", NihOptions)
def open_nih(options: NihOptions, image_size: int) -> NihSource:
    """Build from NIH ChestX-ray14: films, 14 findings, boxes, the official split."""
    return NihSource(options)


class NihSource(ArchiveSource):
    """One film a record. A finding that the text mining did not report is 0, as is usual with this set."""

    name = "nih-cxr14"
    facts = Facts(
        title="NIH ChestX-ray14",
        license="NIH ChestX-ray14 terms: no restrictions on use; attribution required",
        access="free",
        origin="https://nihcc.app.box.com/v/ChestXray-NIHCC",
    )

    def prepare(self) -> None:
        """Names of the labels, published numbers."""
        self.label_names = [*FINDINGS, NO_FINDING]
        self.published = {"all": 112_120, "train": 86_524, "test": 25_596, "boxes": 984}

    def records(self) -> Iterator[Record]:
        """Every film, with its boxes and the official list it stands in."""
        films = self.texts.table(
            "Data_Entry_2017_v2020.csv",
            "Data_Entry_2017.csv",
            columns=["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age",
                     "Patient Gender", "View Position"],
        )  # fmt: skip
        boxes = self.texts.table(_BOXES, columns=["Image Index", "Finding Label", *_BOX_COLUMNS])
        splits = IdLists()
        for split, file in _LISTS.items():
            splits.add(split, (text for _, text in self.texts.lines(file)), file)
        join = self.join()
        join.add("boxes", boxes, key="Image Index")
        for record in join.records(films, boxes="Image Index"):
            if not record.problem:
                record.cells["split"] = splits.one_of(_LISTS, record["Image Index"]) or ""
                self.found["boxes"] += len(record.joined["boxes"])
            yield record

    def identify(self, record: Record) -> Identity:
        """The patient's number is also the beginning of the film's name."""
        image, patient = record.text("Image Index"), record.text("Patient ID")
        if image.partition("_")[0].lstrip("0") != patient.lstrip("0"):
            raise record.error("columns 'Image Index' and 'Patient ID' are about two patients")
        if not record["split"]:
            raise record.error(f"the image is in neither {' nor '.join(_LISTS.values())}")
        return Identity(patient, image, image, record["split"])

    def list_id(self, text: str) -> str:
        """As the base has it; numbers of patients without leading zeros."""
        name = super().list_id(text)
        return name.lstrip("0") if name.isdecimal() else name

    def studies(self, record: Record) -> list[Study]:
        """The film with labels, boxes, sex and age."""
        image = self.image(f"images/{record['Image Index']}", placed=bool(record.joined["boxes"]))
        age = record["Patient Age"].removesuffix("Y")  # "058Y" in the first release
        height, width = image.shape
        scale = (width / _SIDE, height / _SIDE)
        return [
            Study(
                study_id=record["Image Index"],
                patient_id=record["Patient ID"],
                image=image,
                view=record["View Position"].upper(),
                labels=_labels(record),
                boxes=[_box(box, *scale) for box in record.joined["boxes"]],
                extra={
                    "sex": record["Patient Gender"],
                    # Ages such as 411 stand in the first release.
                    "age": int(age) if age.isdecimal() and int(age) <= _OLDEST else None,
                    "follow_up": record["Follow-up #"],
                },
            )
        ]


def _labels(record: Record) -> dict[str, LabelValue]:
    names = [name.strip() for name in record.text("Finding Labels").split("|")]
    unknown = [name for name in names if name not in (*FINDINGS, NO_FINDING)]
    if unknown or (NO_FINDING in names and len(names) > 1):
        raise record.error("column 'Finding Labels' holds other names than the 14 findings, or none and some")
    return {name: int(name in names) for name in (*FINDINGS, NO_FINDING)}


def _box(record: Record, across: float, down: float) -> Box:
    """A box in pixels of the film as it is stored, which may be a smaller copy."""
    name = record.text("Finding Label")
    name = _BOX_NAMES.get(name, name)
    if name not in FINDINGS:
        raise record.error("column 'Finding Label' holds none of the 14 findings")
    box = record.box(name, *_BOX_COLUMNS)
    return Box(box.label, box.x * across, box.y * down, box.width * across, box.height * down)

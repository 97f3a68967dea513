"""Source: CheXpert Plus, CheXpert's images as PNG with their reports, sections and people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.sources.base import option
from shards.sources.chexpert import FINDINGS, image_path
from shards.sources.registry import register
from shards.study import LabelValue, Study
from shards.text.sections import plain_text, split_sections

_TABLE = "df_chexpert_plus_240401.csv"
_REQUIRED = ("path_to_image", "frontal_lateral", "ap_pa", "deid_patient_id", "report", "split")
_SECTIONS = {
    "section_narrative": "narrative",
    "section_clinical_history": "history",
    "section_history": "history",
    "section_comparison": "comparison",
    "section_technique": "technique",
    "section_procedure_comments": "procedure comments",
    "section_findings": "findings",
    "section_impression": "impression",
    "section_end_of_impression": "end of impression",
    "section_summary": "summary",
}
_PEOPLE = ("age", "sex", "race", "ethnicity")


@dataclass(frozen=True, kw_only=True)
class CheXpertPlusOptions(ArchiveOptions):
    """Options of `medvlp shards build chexpert-plus`."""

    labels: Literal["report", "findings", "impression", "none"] = option(
        "text that CheXbert read for the labels", "report"
    )


@register("chexpert-plus", CheXpertPlusOptions)
def open_chexpert_plus(options: CheXpertPlusOptions, image_size: int) -> CheXpertPlusSource:
    """Build from CheXpert Plus: CheXpert's films with their reports, sections and CheXbert's labels."""
    return CheXpertPlusSource(options)


class CheXpertPlusSource(ArchiveSource):
    """One image a record; images of a study share its report."""

    name = "chexpert-plus"
    facts = Facts(
        title="CheXpert Plus",
        license="Stanford University Dataset Research Use Agreement",
        access="research use, by form",
        origin="https://aimi.stanford.edu/datasets/chexpert-plus",
    )
    options: CheXpertPlusOptions
    reading = 3

    def prepare(self) -> None:
        """Names of the labels, published numbers."""
        self.label_names = [] if self.options.labels == "none" else list(FINDINGS)
        self.published = {"all": 223_228}

    def records(self) -> Iterator[Record]:
        """Every image, with the labels of its report."""
        table = self.texts.table(_TABLE, columns=_REQUIRED, optional=[*_SECTIONS, *_PEOPLE])
        join, keys = self.join(), {}
        if self.options.labels != "none":
            file = f"chexbert_labels/{self.options.labels}_fixed.json"
            labels = self.texts.table(file, kind=".jsonl", columns=["path_to_image", *FINDINGS])
            join.add("labels", labels, key=_image, unique=True)
            keys["labels"] = _image
        yield from join.records(table, **keys)

    def identify(self, record: Record) -> Identity:
        """Patient and study of the path "train/patient00001/study1/view1_frontal.jpg"."""
        parts = image_path(record.text("path_to_image")).split("/")
        if len(parts) != 4:
            raise record.error(
                "column 'path_to_image' is no path like train/patient00001/study1/view1_frontal"
            )
        _, patient, study, _ = parts
        if patient != record.text("deid_patient_id"):
            raise record.error("columns 'path_to_image' and 'deid_patient_id' are about two patients")
        return Identity(patient, _image(record), f"{patient}/{study}", record.split("split"))

    def list_id(self, text: str) -> str:
        """The path from the split's folder on, without the ending; a patient or study as it is."""
        path = image_path(text.strip())
        return path.rpartition(".")[0] if path.lower().endswith((".jpg", ".png")) else path

    def studies(self, record: Record) -> list[Study]:
        """The image with report, labels and what is known of the person."""
        sections = _sections(record)
        if not sections:
            raise record.error("no report")
        identity = self.identify(record)
        side, frontal = record["ap_pa"].upper(), record["frontal_lateral"].lower() != "lateral"
        return [
            Study(
                study_id=identity.study,
                patient_id=identity.patient,
                # The table writes .jpg, the files are .png.
                image=self.image(f"PNG/{_image(record)}.png"),
                view=(side or "FRONTAL") if frontal else "LATERAL",
                sections=sections,
                labels=self._labels(record),
                extra={name: record[name] for name in _PEOPLE if record[name]},
            )
        ]

    def _labels(self, record: Record) -> dict[str, LabelValue]:
        if self.options.labels == "none":
            return {}
        rows = record.joined["labels"]
        return {name: rows[0].label(name) if rows else None for name in FINDINGS}


def _image(record: Record) -> str:
    """Path of the image from the split's folder on, without its ending, which differs from file to file."""
    return image_path(record["path_to_image"]).rpartition(".")[0]


def _sections(record: Record) -> dict[str, str]:
    """The sections' columns; where all are empty the report by its headings."""
    sections: dict[str, str] = {}
    for column, name in _SECTIONS.items():
        text = plain_text(record[column]).strip()
        if text:
            sections[name] = f"{sections[name]}\n{text}" if name in sections else text
    return sections or split_sections(record["report"])

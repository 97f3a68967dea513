"""Source: MIMIC-CXR-JPG with MIMIC-CXR's reports, and what other sets say about its images and reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

from shards.archives import mimic
from shards.archives.files import read_member
from shards.archives.id_lists import IdLists
from shards.archives.records import Join, Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.entities.radgraph import stream_radgraph
from shards.errors import DataError, UsageError
from shards.format import hash_file
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Entity, LabelValue, Study
from shards.text.mimic_sections import mimic_sections

#: In the order of the tables, which is alphabetical.
FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture",
    "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia",
    "Pneumothorax", "Support Devices",
)  # fmt: skip
#: Splits of all images of patients who are training patients of MIMIC-CXR and test patients of another set.
MS_CXR_SPLIT, GOLD_SPLIT = "ms_cxr", "imagenome_gold"

_FRONTAL = ("PA", "AP")
#: Views by their description, for the images (4 %) without ViewPosition.
_VIEWS = {"postero-anterior": "PA", "antero-posterior": "AP", "lateral": "LATERAL", "left lateral": "LL"}
_REPORT_LIMIT = 1 << 20
#: Images that are tried before reports are said to be missing altogether.
_TRIED = 20


@dataclass(frozen=True, kw_only=True)
class MimicOptions(ArchiveOptions):
    """Options of `medvlp shards build mimic-cxr`."""

    reports: Path | None = option("folder or zip of MIMIC-CXR's reports; default: they lie in --root", None)
    no_reports: bool = option("images and labels only", False)
    labels: Literal["chexpert", "negbio", "none"] = option("who labelled the reports", "chexpert")
    manual_labels: bool = option("labels by hand for test studies, of release 2.1.0", False)
    views: Literal["all", "frontal"] = option("frontal: PA and AP only", "all")
    radgraph: Path | None = option("RadGraph's MIMIC-CXR_graphs.json: entities of the reports", None)
    ms_cxr: Path | None = option(
        f"MS-CXR's folder: phrases with boxes; its patients leave train (split {MS_CXR_SPLIT})", None
    )
    imagenome: Path | None = option(
        f"Chest ImaGenome's folder: regions of anatomy; its gold patients leave train (split {GOLD_SPLIT}), "
        "images that are test in one of the two sets only are left out",
        None,
    )


@register("mimic-cxr", MimicOptions)
def open_mimic(options: MimicOptions, image_size: int) -> MimicSource:
    """Build from MIMIC-CXR-JPG and MIMIC-CXR's reports: sections, 14 labels, the official split."""
    return MimicSource(options)


class MimicSource(ArchiveSource):
    """One image a record; images of a study share report and labels."""

    name = "mimic-cxr"
    facts = Facts("MIMIC-CXR-JPG", mimic.LICENSE, mimic.ACCESS, mimic.JPG_ORIGIN)
    reading = 2
    options: MimicOptions

    def prepare(self) -> None:
        """Tables of the set and of those that are joined."""
        options = self.options
        self.label_names = list(FINDINGS) if options.labels != "none" or options.manual_labels else []
        self.published = {"all": 377_110, "train": 368_960, "valid": 2_991, "test": 5_159}
        self._images = self.texts.table(
            "mimic-cxr-2.0.0-metadata.csv",
            columns=["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"],
            optional=["ViewCodeSequence_CodeMeaning"],
        )
        self._reports = self.files
        if options.reports is not None:
            if options.no_reports:
                raise UsageError("--no-reports reads none of --reports: give one of the two")
            self._reports = self.open(options.reports, mimic.REPORTS_ORIGIN).files
        if not options.no_reports:
            self._check_reports()
        self._imagenome = self._regions = None
        if options.imagenome is not None:
            self._imagenome = self.open(mimic.imagenome_root(options.imagenome), mimic.IMAGENOME_ORIGIN)
            mimic.check_scene_graphs(self._imagenome)
            self._regions = self._imagenome.files
        self._ms_cxr_patients: set[str] = set()

    def records(self) -> Iterator[Record]:
        """Every image, with its split, the labels of its study, phrases and entities."""
        join = self.join()
        keys = {"split": "dicom_id"}
        table = self.texts.table("mimic-cxr-2.0.0-split.csv", columns=["dicom_id", "split"])
        join.add("split", table, key="dicom_id", unique=True)
        keys |= self._join_labels(join)
        if self.options.radgraph is not None:
            join.add("entities", _Graphs(self.options.radgraph), key="study", unique=True)
            self.texts.hashes["--radgraph"] = hash_file(self.options.radgraph)
            keys["entities"] = "study_id"
        if self.options.ms_cxr is not None:
            boxes = mimic.ms_cxr_table(self.open(self.options.ms_cxr, mimic.MS_CXR_ORIGIN))
            join.add("phrases", boxes, key="dicom_id")
            keys["phrases"] = "dicom_id"
            self._ms_cxr_patients = {mimic.ms_cxr_place(box)[0] for box in boxes}
            self.published[f"phrases of {boxes.name}"] = mimic.MS_CXR_PHRASES
            self.found[f"phrases of {boxes.name}"] = len({(b["dicom_id"], b["label_text"]) for b in boxes})
        imagenome = self._imagenome_lists()
        for record in join.records(self._images, **keys):
            if not record.problem:
                held = imagenome.of(record["dicom_id"], record["subject_id"]) if imagenome else []
                record.cells["imagenome"] = " ".join(held)
            yield record

    def identify(self, record: Record) -> Identity:
        """Numbers of patient and study; the official split, unless another set tests on the patient."""
        dicom, subject, study = (record.text(name) for name in ("dicom_id", "subject_id", "study_id"))
        if not record.joined["split"]:
            raise record.error("mimic-cxr-2.0.0-split.csv has no row for the image")
        official = split = record.joined["split"][0].split("split")
        left_out = ""
        if self.options.views == "frontal" and _view(record) not in _FRONTAL:
            left_out = "neither PA nor AP"
        lists = record["imagenome"].split()
        if "known" in lists and ("test" in lists) != (official == "test"):
            left_out = left_out or "test in one of MIMIC-CXR and Chest ImaGenome only"
        if official == "train" and "gold" in lists:
            split = GOLD_SPLIT
        elif official == "train" and subject in self._ms_cxr_patients:
            split = MS_CXR_SPLIT
        return Identity(subject, dicom, study, split, official, left_out)

    def list_id(self, text: str) -> str:
        """An image by its DICOM id, a patient or study by its number, with or without "p" and "s"."""
        return mimic.bare_number(super().list_id(text))

    def studies(self, record: Record) -> list[Study]:
        """The image with report, labels, and what the joined sets say."""
        subject, study, dicom = record["subject_id"], record["study_id"], record["dicom_id"]
        sections = {} if self.options.no_reports else self._sections(subject, study)
        phrases = record.joined.get("phrases", [])
        placed = bool(phrases) or self._regions is not None
        image = self.image(mimic.image_path(subject, study, dicom), placed=placed)
        regions = []
        if self._regions is not None:
            original = (record.number("Rows"), record.number("Columns"))
            regions = mimic.anatomy(self._regions, dicom, original, image.shape)
            if "known" in record["imagenome"].split() and not regions:
                self.notes["images of Chest ImaGenome have no scene graph"] += 1
            if regions and not record["imagenome"]:
                raise record.error(
                    "the image has a scene graph, but stands in none of train.csv, valid.csv, test.csv and "
                    "images_to_avoid.csv; get these again from " + mimic.IMAGENOME_ORIGIN
                )
        return [
            Study(
                study_id=study,
                patient_id=subject,
                image=image,
                view=_view(record),
                sections=sections,
                labels=self._labels(record),
                entities=[
                    Entity(*entity)
                    for row in record.joined.get("entities", [])
                    for entity in json.loads(row["entities"])
                ],
                anatomy=regions,
                phrases=mimic.phrases(phrases, image.shape),
            )
        ]

    def _sections(self, subject: str, study: str) -> dict[str, str]:
        member = self._reports.find(mimic.report_path(subject, study))
        if member is None:
            raise DataError("report does not exist in the archive")
        data = read_member(member, _REPORT_LIMIT)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        sections = mimic_sections(text, study)
        if not sections:
            raise DataError("report is empty")
        return sections

    def _labels(self, record: Record) -> dict[str, LabelValue]:
        """Labels of the study; those by hand where they are asked for and the study has some."""
        if manual := record.joined.get("manual"):
            row = manual[0]
            # This file calls it so.
            names = {"Lung Opacity": "Airspace Opacity"} if not row["Lung Opacity"] else {}
            return {name: row.label(names.get(name, name)) for name in FINDINGS}
        rows = record.joined.get("labels")
        if rows is None:
            return {}
        return {name: rows[0].label(name) if rows else None for name in FINDINGS}

    def _join_labels(self, join: Join) -> dict[str, str]:
        """Join the tables of labels; by which column of an image each is looked up."""
        keys = {}
        if self.options.labels != "none":
            file = f"mimic-cxr-2.0.0-{self.options.labels}.csv"
            table = self.texts.table(file, columns=["study_id", *FINDINGS])
            join.add("labels", table, key="study_id", unique=True)
            self.published[f"rows of {file}"] = 227_827
            self.found[f"rows of {file}"] = join.count("labels")
            keys["labels"] = "study_id"
        if self.options.manual_labels:
            file = "mimic-cxr-2.1.0-test-set-labeled.csv"
            optional = [*FINDINGS, "Airspace Opacity"]
            table = self.texts.table(file, columns=["study_id"], optional=optional)
            if len(table.absent) == len(optional):
                raise DataError(f"{file} has a column for none of the 14 findings; {table.again()}")
            join.add("manual", table, key="study_id", unique=True)
            keys["manual"] = "study_id"
        return keys

    def _check_reports(self) -> None:
        """Fail at once where there are no reports at all."""
        for record in islice(self._images, _TRIED):
            if record.problem:
                continue
            if self._reports.find(mimic.report_path(record["subject_id"], record["study_id"])) is not None:
                return
        raise DataError(
            f"{self._reports.root} has none of the reports (files/p10/p10000001/s50000001.txt and so on); "
            f"get it from {mimic.REPORTS_ORIGIN} and name folder or zip by --reports, or give --no-reports"
        )

    def _imagenome_lists(self) -> IdLists | None:
        """Lists of Chest ImaGenome: "known" images, those of them that are "test", "gold" patients."""
        if self._imagenome is None:
            return None
        lists = IdLists(self.list_id)
        for name, column, files in (
            ("known", "dicom_id", ("train", "valid", "test")),
            ("test", "dicom_id", ("test",)),
            ("gold", "subject_id", ("images_to_avoid",)),
        ):
            for file in files:
                table = self._imagenome.table(f"splits/{file}.csv", columns=[column])
                lists.add(name, table.cells(column), table.name)
        return lists


@dataclass(frozen=True)
class _Graphs:
    """RadGraph's reports as rows of a number of a study and its entities."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def __iter__(self) -> Iterator[Record]:
        for number, (identifier, entities) in enumerate(stream_radgraph(self.path), start=1):
            listed = [[entity.anatomy, entity.observation, entity.value] for entity in entities]
            study = mimic.bare_number(PurePosixPath(identifier).stem)
            yield Record(self.name, number, {"study": study, "entities": json.dumps(listed)})

    def again(self) -> str:
        return "get the file again from https://physionet.org/content/radgraph/"


def _view(record: Record) -> str:
    described = record["ViewCodeSequence_CodeMeaning"].lower()
    return record["ViewPosition"].upper() or _VIEWS.get(described, "")

"""Source: Indiana University chest X-rays (Open-i): its XML, Kaggle's two CSV files, or R2Gen's JSON."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import xxhash

from shards.archives.files import read_member
from shards.archives.records import Record, object_records
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.dicom_header import read_header
from shards.errors import DataError
from shards.sources.base import option
from shards.sources.registry import register
from shards.splits import normalise_split
from shards.study import LabelValue, Study

#: MeSH headings that are findings; the manual indexing has about 120 headings, many of them anatomy.
FINDINGS = (
    "Airspace Disease", "Atherosclerosis", "Calcified Granuloma", "Cardiomegaly", "Catheters, Indwelling",
    "Cicatrix", "Consolidation", "Emphysema", "Fractures, Bone", "Granuloma", "Granulomatous Disease",
    "Hernia, Hiatal", "Implanted Medical Device", "Infiltrate", "Mass", "Nodule", "Opacity", "Osteophyte",
    "Pleural Effusion", "Pneumonia", "Pneumothorax", "Pulmonary Atelectasis", "Pulmonary Congestion",
    "Pulmonary Disease, Chronic Obstructive", "Pulmonary Edema", "Pulmonary Emphysema", "Pulmonary Fibrosis",
    "Scoliosis", "Spondylosis",
)  # fmt: skip
NORMAL = "normal"
#: Headings of reports that were not indexed.
_NOT_INDEXED = {"No Indexing", "Technical Quality of Image Unsatisfactory"}
#: What terms beside the findings' own headings say of them: heading, one of its qualifiers ("": any) ->
#: findings that are then present, findings that may be.
_SAYS: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("Cardiac Shadow", "enlarged"): (("Cardiomegaly",), ()),
    ("Cardiac Shadow", "prominent"): ((), ("Cardiomegaly",)),
    ("Cardiac Shadow", "borderline"): ((), ("Cardiomegaly",)),
    ("Cardiac Shadow", "obscured"): ((), ("Cardiomegaly",)),
    ("Heart", "enlarged"): (("Cardiomegaly",), ()),
    ("Heart", "prominent"): ((), ("Cardiomegaly",)),
    ("Heart", "obscured"): ((), ("Cardiomegaly",)),
    ("Heart Atria", "enlarged"): ((), ("Cardiomegaly",)),
    ("Heart Ventricles", "enlarged"): ((), ("Cardiomegaly",)),
    ("Hydropneumothorax", ""): (("Pneumothorax", "Pleural Effusion"), ()),
    ("Hemopneumothorax", ""): (("Pneumothorax", "Pleural Effusion"), ()),
    ("Hemothorax", ""): (("Pleural Effusion",), ()),
    ("Bullous Emphysema", ""): (("Emphysema", "Pulmonary Emphysema"), ()),
    ("Pulmonary Emphysema", ""): (("Emphysema",), ()),
    ("Emphysema", ""): ((), ("Pulmonary Emphysema",)),
    ("Calcified Granuloma", ""): (("Granuloma",), ()),
}
_SECTIONS = ("comparison", "indication", "findings", "impression")

_XML_FOLDER, _XML_LIMIT = "ecgen-radiology", 1 << 20
_REPORTS, _PROJECTIONS, _ANNOTATION = "indiana_reports.csv", "indiana_projections.csv", "annotation.json"
_NO_IMAGE = "reports without an image"

Form = Literal["xml", "csv", "r2gen"]


@dataclass(frozen=True, kw_only=True)
class IuOptions(ArchiveOptions):
    """Options of `medvlp shards build iu-xray`."""

    form: Form | None = option(
        "xml (Open-i), csv (Kaggle) or r2gen (annotation.json and its split); default: what is there",
        None,
    )


@register("iu-xray", IuOptions)
def open_iu(options: IuOptions, image_size: int) -> "IuSource":
    """Build from the Indiana University chest X-rays: films, reports, MeSH headings; R2Gen's split."""
    return IuSource(options)


class IuSource(ArchiveSource):
    """One film a record; a report is a patient, because nothing else is known of whose it is."""

    name = "iu-xray"
    facts = Facts(
        title="Indiana University chest X-rays",
        license="CC BY-NC-ND 4.0",
        access="free",
        origin="https://openi.nlm.nih.gov/faq (NLMCXR_reports.tgz and NLMCXR_png.tgz)",
    )
    reading = 4
    options: IuOptions

    def prepare(self) -> None:
        """Which of its forms is there, and the numbers published of it."""
        self._form = self.options.form or self._find_form()
        self.label_names = [] if self._form == "r2gen" else [*FINDINGS, NORMAL]
        self.published = {
            "xml": {"all": 7_470, "reports": 3_955, "with findings and impression": 3_419, _NO_IMAGE: 104},
            "csv": {"all": 7_466, "reports": 3_851},
            "r2gen": {"train": 4_138, "valid": 592, "test": 1_180, "reports": 2_955},
        }[self._form]

    def records(self) -> Iterator[Record]:
        """Every film with its report."""
        yield from {"xml": self._of_xml, "csv": self._of_csv, "r2gen": self._of_r2gen}[self._form]()

    def identify(self, record: Record) -> Identity:
        """The report is also the patient."""
        return Identity(record["uid"], record["image"], record["uid"], record["split"] or None)

    def list_id(self, text: str) -> str:
        """A report "CXR1", also written 1 or 1.xml, or a film "CXR1_IM-0001-3001" in any of the forms."""
        return _film_id(text.strip())

    def studies(self, record: Record) -> list[Study]:
        """The film with its sections and labels."""
        mesh = json.loads(record["mesh"])
        return [
            Study(
                study_id=record["uid"],
                patient_id=record["uid"],
                image=self.image(*json.loads(record["paths"])),
                view=record["view"].upper() or self._view_of_dicom(record["image"]),
                sections=json.loads(record["sections"]),
                labels=_labels(mesh) if self._form != "r2gen" else {},
                extra={"mesh": mesh} if self._form != "r2gen" else {},
            )
        ]

    def _view_of_dicom(self, film: str) -> str:
        """View by the original DICOM file, where NLMCXR_dcm was unpacked too: the XML does not tell it."""
        name = film.removeprefix("CXR")
        member = self.files.find(f"NLMCXR_dcm/{name.partition('_')[0]}/{name}.dcm")
        if member is None:
            return ""
        with member.open() as file:
            return read_header(file).view

    def _find_form(self) -> Form:
        has_xml = next(self._xml_names(), None) is not None
        has_csv = self.files.find(_REPORTS, or_gzip=True) is not None
        if self.files.find(_ANNOTATION, or_gzip=True) is None:
            return "csv" if has_csv and not has_xml else "xml"
        if has_xml or has_csv:
            raise DataError(
                f"{self.options.root} holds both {_ANNOTATION} and the original reports; say which is meant: "
                "--form r2gen, or --form xml or csv"
            )
        return "r2gen"

    def _xml_names(self) -> Iterator[str]:
        for name in self.files.names(".xml"):
            folder = PurePosixPath(name).parent.name
            if folder in ("", ".") or folder.casefold() == _XML_FOLDER:
                yield name

    def _of_xml(self) -> Iterator[Record]:
        projections = self._projections() if self.files.find(_PROJECTIONS, or_gzip=True) is not None else {}
        digest = xxhash.xxh3_128()
        for name in self._xml_names():
            file = PurePosixPath(name).name
            try:
                data = read_member(self.files.listed(name), _XML_LIMIT)
                digest.update(data)
                report = _read_xml(data)
            except DataError as error:
                yield Record(file, 1, {}, problem=str(error))
                continue
            self._count(report)
            for image in report.images:
                paths = [f"NLMCXR_png/{image}.png", f"images/{image}.png", f"{image}.png"]
                view = projections.get(_film_id(image), "")
                yield _record(file, 1, report, _film_id(image), paths, view=view)
        if not self.found["reports"]:
            raise DataError(
                f"{self.options.root} has no report {_XML_FOLDER}/*.xml that can be read; get it from "
                + self.facts.origin
            )
        self.texts.hashes[f"{_XML_FOLDER}/*.xml"] = f"xxh3:{digest.hexdigest()}"

    def _projections(self) -> dict[str, str]:
        """View of each film by Kaggle's table, which may stand beside the original reports."""
        table = self.texts.table(_PROJECTIONS, columns=["uid", "filename", "projection"])
        return {_film_id(record["filename"]): record["projection"] for record in table if not record.problem}

    def _of_csv(self) -> Iterator[Record]:
        columns = ["uid", "MeSH", "indication", "comparison", "findings", "impression"]
        reports = self.texts.table(_REPORTS, columns=columns)
        films = self.texts.table(_PROJECTIONS, columns=["uid", "filename", "projection"])
        join = self.join()
        join.add("reports", reports, key="uid", unique=True)
        self.found["reports"] = sum(1 for _ in reports)
        for film in join.records(films, reports="uid"):
            if film.problem:
                yield film
                continue
            if not film.joined["reports"]:
                yield Record(film.file, film.line, {}, problem=f"{_REPORTS} has no report of the film")
                continue
            row = film.joined["reports"][0]
            report = _Report(
                uid=_uid(row["uid"]),
                images=[],
                sections={name: row[name] for name in _SECTIONS if row[name]},
                mesh=[term.strip() for term in row["MeSH"].split(";") if term.strip()],
            )
            name = film["filename"]
            paths = [f"images/images_normalized/{name}", f"images_normalized/{name}", f"images/{name}", name]
            yield _record(film.file, film.line, report, _film_id(name), paths, view=film["projection"])

    def _of_r2gen(self) -> Iterator[Record]:
        annotation = self.texts.json(_ANNOTATION)
        if not isinstance(annotation, dict) or not set(annotation) <= {"train", "val", "test"}:
            raise DataError(
                f"{_ANNOTATION} is no object with the lists train, val and test; get the file from R2Gen's "
                "repository (github.com/zhjohnchan/R2Gen)"
            )
        for split, items in annotation.items():
            for item in object_records(
                items, f"{_ANNOTATION} ({split})", ["id", "report", "image_path", "split"]
            ):
                yield from self._of_item(item, split)

    def _of_item(self, item: Record, split: str) -> Iterator[Record]:
        if item.problem:
            yield item
            return
        paths, problem = _paths(item["image_path"]), ""
        if not paths:
            problem = "'image_path' is no list of paths"
        elif item["split"] != split:
            problem = f"'split' is not {split}, in whose list the item stands"
        elif not item["id"] or not item["report"]:
            problem = "an item has no 'id' or no 'report'"
        if problem:
            yield Record(item.file, item.line, {}, problem=problem)
            return
        report = _Report(_uid(item["id"].partition("_")[0]), [], {"findings": item["report"]}, [])
        self.found["reports"] += 1
        for path in paths:
            places = [f"images/{path}", path]
            yield _record(item.file, item.line, report, _film_id(path), places, split=normalise_split(split))

    def _count(self, report: "_Report") -> None:
        self.found["reports"] += 1
        self.found["with findings and impression"] += {"findings", "impression"} <= report.sections.keys()
        self.found[_NO_IMAGE] += not report.images


@dataclass(frozen=True)
class _Report:
    """A report, whatever form it came in."""

    uid: str
    images: list[str]
    sections: dict[str, str]
    mesh: list[str]


def _record(
    file: str, line: int, report: _Report, image: str, paths: list[str], *, view: str = "", split: str = ""
) -> Record:
    cells = {
        "uid": report.uid,
        "image": image,
        "paths": json.dumps(paths),
        "sections": json.dumps(report.sections),
        "mesh": json.dumps(report.mesh),
        "view": view,
        "split": split,
    }
    return Record(file, line, cells)


def _read_xml(data: bytes) -> _Report:
    """A report in the XML of Open-i.

    Raises:
        DataError: it is none; the message holds nothing of it.
    """
    root = _parse_xml(data)
    uid = root.find("uId")
    if root.tag != "eCitation" or uid is None or not uid.get("id"):
        raise DataError("no report of Open-i: its root is not eCitation, or it has no uId")
    sections: dict[str, str] = {}
    for text in root.iterfind(".//AbstractText"):
        name, words = text.get("Label", "").lower(), " ".join("".join(text.itertext()).split())
        if name not in _SECTIONS or name in sections:
            raise DataError("AbstractText has an unknown Label, or one twice")
        if words:
            sections[name] = words
    images = [image.get("id", "") for image in root.iterfind("parentImage")]
    if not all(images):
        raise DataError("a parentImage has no id")
    mesh = ["".join(term.itertext()).strip() for term in root.iterfind("MeSH/major")]
    return _Report(uid.attrib["id"], images, sections, [term for term in mesh if term])


def _parse_xml(data: bytes) -> Element:
    """The root; a document type is refused, since its entities can grow without bound.

    Hand-written because `xml.etree` cannot be told to refuse one.
    """

    def refuse(*_: object) -> None:
        raise DataError("XML with a document type is not read")

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise DataError("not well-formed XML") from error
    return builder.close()


def _paths(text: str) -> list[str]:
    """The paths of a JSON list; none where it is no such list."""
    try:
        paths = json.loads(text)
    except ValueError:
        return []
    return paths if isinstance(paths, list) and all(isinstance(path, str) for path in paths) else []


def _labels(mesh: list[str]) -> dict[str, LabelValue]:
    """Findings among the terms of a report; unknown where it was not indexed or a term leaves it open."""
    terms = [term.split("/") for term in mesh]
    present = {heading for heading, *_ in terms}
    if not present - _NOT_INDEXED:
        return dict.fromkeys((*FINDINGS, NORMAL))
    open_to_doubt: set[str] = set()
    for heading, *qualifiers in terms:
        for qualifier in ("", *qualifiers):
            certain, possible = _SAYS.get((heading, qualifier), ((), ()))
            present.update(certain)
            open_to_doubt.update(possible)
    absent: dict[str, LabelValue] = {name: None if name in open_to_doubt else 0 for name in FINDINGS}
    return {name: 1 if name in present else absent.get(name, 0) for name in (*FINDINGS, NORMAL)}


def _uid(number: str) -> str:
    """The report's id: Kaggle leaves out its letters."""
    return f"CXR{number}" if number.isdecimal() else number


def _film_id(path: str) -> str:
    """One form for "CXR1_1_IM-0001-3001" (Open-i), "1_IM-0001-3001.dcm.png" (Kaggle), "CXR1_IM/0.png".

    Open-i repeats the report's number in two names only; R2Gen's names are told apart by their folders.
    """
    name = re.sub(r"(?:\.(?:dcm|png|jpg|xml|txt))+$", "", path.replace("\\", "/"), flags=re.IGNORECASE)
    folder, _, last = name.rpartition("/")
    if last.isdecimal() and (place := folder.rpartition("/")[2]).startswith("CXR"):
        last = f"{place}_{last}"
    return re.sub(r"^(?:CXR)?(\d+)(?:_\1(?=_))?(?=_|$)", r"CXR\1", last)

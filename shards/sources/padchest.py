"""Source: PadChest, 160,868 films with Spanish reports and up to 193 findings and diagnoses."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.errors import DataError
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import LabelValue, Study

_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
_COLUMNS = (
    "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM",
    "Projection", "PhotometricInterpretation_DICOM", "Report", "MethodLabel", "Labels",
)  # fmt: skip
_VIEWS = {"PA": "PA", "L": "LATERAL", "AP": "AP", "AP_horizontal": "AP", "COSTAL": "COSTAL", "": ""}
_METHODS = {"Physician": "physician", "RNN_model": "model"}
_NORMAL = "normal"
#: Entries of Labels that are no findings; with one of the latter two, what else is listed is incomplete.
_UNCHANGED, _INCOMPLETE = "unchanged", {"exclude", "suboptimal study"}
#: Published are 193 names; many more are no labels but damage.
_MOST_NAMES = 1000
_LONGEST_LIST = 10_000
_INVERTED = "MONOCHROME1 films were inverted"
_LOOKS_NEGATIVE = (
    "films that were inverted are brighter at their edges than in the middle: look at them (medvlp shards "
    "view), and build with --keep-polarity if they are negatives"
)


@dataclass(frozen=True, kw_only=True)
class PadChestOptions(ArchiveOptions):
    """Options of `medvlp shards build padchest`."""

    keep_polarity: bool = option("leave films as they are that the table calls MONOCHROME1", False)


@register("padchest", PadChestOptions)
def open_padchest(options: PadChestOptions, image_size: int) -> "PadChestSource":
    """Build from PadChest: 16-bit films, Spanish reports, findings and diagnoses; no official split."""
    return PadChestSource(options)


class PadChestSource(ArchiveSource):
    """One film a record. A listed finding is 1, the others 0 where the list can be complete, else unknown."""

    name = "padchest"
    facts = Facts(
        title="PadChest",
        license="PadChest Dataset Research Use Agreement",
        access="free after registration, research use",
        origin="https://bimcv.cipf.es/bimcv-projects/padchest/",
    )
    language = "es"
    options: PadChestOptions

    def prepare(self) -> None:
        """The table; the findings are those that it names."""
        self.published = {"all": 160_868}
        self._table = self.texts.table(
            _TABLE,
            "PADCHEST_chest_x_ray_images_labels_160K.csv",
            columns=_COLUMNS,
            optional=["Localizations"],
        )
        names: set[str] = set()
        for record in self._table:
            names.update(_names(record["Labels"]) or [] if not record.problem else [])
            if len(names) > _MOST_NAMES:
                raise DataError(
                    f"{self._table.name}, line {record.line}: column 'Labels' names more than "
                    f"{_MOST_NAMES:,} findings, 193 are published; {self._table.again()}"
                )
        self.label_names = sorted(names - {_NORMAL, _UNCHANGED} - _INCOMPLETE)

    def records(self) -> Iterator[Record]:
        """Every row."""
        yield from self._table

    def identify(self, record: Record) -> Identity:
        """As the table has it."""
        return Identity(record["PatientID"], record.text("ImageID"), record.text("StudyID"))

    def parts(self, record: Record) -> list[str]:
        """The films that physicians labelled, which are often the test set."""
        return ["physician"] if record["MethodLabel"] == "Physician" else []

    def studies(self, record: Record) -> list[Study]:
        """The film with its report and labels."""
        projection, method = record["Projection"], record["MethodLabel"]
        if projection not in _VIEWS:  # EXCLUDE is what its authors call films that are none of the chest
            raise record.error("column 'Projection' names no view of the chest")
        if method not in _METHODS:
            raise record.error("column 'MethodLabel' is neither Physician nor RNN_model")
        report = record["Report"]
        return [
            Study(
                study_id=record["StudyID"],
                patient_id=record["PatientID"],
                image=self._film(record),
                view=_VIEWS[projection],
                sections={"findings": report} if report else {},
                labels=self._labels(record),
                extra={
                    "sex": record["PatientSex_DICOM"],
                    "age": _age(record),
                    "projection": projection,
                    "labelled_by": _METHODS[method],
                    "localizations": [
                        name.removeprefix("loc ") for name in _names(record["Localizations"]) or []
                    ],
                },
            )
        ]

    def _labels(self, record: Record) -> dict[str, LabelValue]:
        names = _names(record.text("Labels"))
        if not names:
            raise record.error("column 'Labels' is no list of names")
        is_complete = set(names) != {_UNCHANGED} and not _INCOMPLETE & set(names)
        absent = 0 if is_complete else None
        return {name: 1 if name in names else absent for name in self.label_names}

    def _film(self, record: Record) -> NDArray[np.uint8]:
        image = record["ImageID"]
        film = self.image(f"{record['ImageDir']}/{image}", image)  # a zip may lack its folder's name
        if record["PhotometricInterpretation_DICOM"] != "MONOCHROME1" or self.options.keep_polarity:
            return film
        self.notes[_INVERTED] += 1
        film = 255 - film
        edges = np.concatenate([film[0], film[-1], film[:, 0], film[:, -1]])
        height, width = film.shape
        middle = film[height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None]
        if np.median(edges) > np.median(middle):
            self.notes[_LOOKS_NEGATIVE] += 1
        return film


def _names(text: str) -> list[str] | None:
    """Names of a cell such as "['cardiomegaly', ' pleural effusion']", without repetitions; None: no list."""
    try:
        names = ast.literal_eval(text) if len(text) <= _LONGEST_LIST else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def _age(record: Record) -> int | None:
    """Years between birth and film, of which only the years are known."""
    born, taken = record["PatientBirth"].removesuffix(".0"), record["StudyDate_DICOM"][:4]
    if not (born.isdecimal() and taken.isdecimal()) or not 0 <= int(taken) - int(born) <= 120:
        return None
    return int(taken) - int(born)

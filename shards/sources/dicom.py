"""Source: a folder of DICOM files, with a report for each study where there is one."""

import codecs
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from shards.archives.files import read_member
from shards.archives.records import Join, Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.dicom import read_dicom
from shards.dicom_header import DicomHeader, is_dicom, read_header
from shards.dicom_windows import Window
from shards.errors import DataError
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Study
from shards.text.headings import LANGUAGES
from shards.text.sections import split_sections

#: Endings of files that are meant to be DICOM; files of other endings are, if they begin like one.
_ENDINGS = (".dcm", ".dicom", ".ima")
_REPORT = "report.txt"
_REPORT_LIMIT = 1 << 20
#: Notes on images that are stored without a report.
_NONE_BESIDE, _EMPTY_TEXT, _NO_ROW, _EMPTY_ROW = (
    f"images have {lack}"
    for lack in (
        "no report beside them",
        "an empty text file in place of a report",
        "no row in the table of --reports",
        "an empty report in the table of --reports",
    )
)
_LATIN = "reports are not UTF-8 and were read as Latin-1"
#: Stands for several studies in one folder, of which none is meant.
_SEVERAL = "*"


@dataclass(frozen=True, kw_only=True)
class DicomOptions(ArchiveOptions):
    """Options of `medvlp shards build dicom`."""

    reports: Path | None = option(
        "CSV or JSON lines with StudyInstanceUID and report; default: text files beside the images", None
    )
    language: str = option(f"of the reports: {', '.join(LANGUAGES)}", "en")
    modality: list[str] = option("modalities that are taken (repeatable)", ["CR", "DX"])
    window: Window = option("DICOM values to grey levels", "auto")
    as_stored: bool = option("keep films that PatientOrientation calls turned or mirrored as stored", False)
    raw: bool = option("take raw values of detectors too, images FOR PROCESSING", False)
    license: str = option("licence of the images, which every sample names", "not stated")


@register("dicom", DicomOptions)
def open_dicom(options: DicomOptions, image_size: int) -> "DicomSource":
    """Build from a folder of DICOM files of any depth, with a report a study where there is one."""
    return DicomSource(options)


class DicomSource(ArchiveSource):
    """One DICOM file a record; patient, study and image are those of its header.

    Paths of files may name patients, so a message names a file by its number in the order of their paths.
    """

    name = "dicom"
    facts = Facts(
        title="DICOM files",
        license="not stated",
        access="your own files",
        origin="where the images are kept",
    )
    options: DicomOptions
    reading = 8

    def prepare(self) -> None:
        """No labels, no published numbers."""
        self.label_names, self.published = [], {}
        self.language = self.options.language
        if self.language not in LANGUAGES:
            raise DataError(f"--language {self.language}: choose {', '.join(LANGUAGES)}")

    def records(self) -> Iterator[Record]:
        """Every DICOM file, with the report of its study or the path of the text file that holds it."""
        scan = _Scan()
        for number, path in enumerate(self.files.names(""), start=1):
            self._look_at(scan, number, path)
        digest = xxhash.xxh3_128()
        join = self._reports_table()
        records = scan.records(with_files=join is None)
        for record in records if join is None else join.records(records, report="study"):
            digest.update(record.to_json().encode())
            yield record
        self.texts.hashes["DICOM headers"] = f"xxh3:{digest.hexdigest()}"
        self.texts.remarks += scan.remarks(with_files=join is None)

    def identify(self, record: Record) -> Identity:
        """As the header has it; the unique ids are those of DICOM."""
        if record["mixed"]:
            raise record.error("its StudyInstanceUID is also that of another patient")
        if not record["modality"]:
            raise record.error("no Modality in the header")
        return Identity(
            patient=record["patient"],
            image=record.text("image"),
            study=record.text("study"),
            left_out=self._left_out(record),
        )

    def _left_out(self, record: Record) -> str:
        if record["modality"] not in self.options.modality:
            return "a modality that --modality does not name"
        return "" if self.options.raw or not record["raw"] else "FOR PROCESSING, which --raw takes"

    def list_id(self, text: str) -> str:
        """An id as the header has it."""
        return text.strip()

    def studies(self, record: Record) -> list[Study]:
        """The image with the report of its study."""
        data = read_member(self.files.listed(_path(record["path"])))
        film = read_dicom(data, self.options.window, turn=not self.options.as_stored)
        found = (film.patient_id, film.study_uid, film.image_uid)
        if found != (record["patient"], record["study"], record["image"]):
            raise record.error("has another patient, study or image than when the build began")
        self.notes.update(film.notes)
        text = self._report(record)
        return [
            Study(
                study_id=film.study_uid,
                patient_id=film.patient_id,
                image=film.pixels,
                view=film.view,
                sections=split_sections(text, self.language) if text else {},
                license=self.options.license,
                extra={
                    "sex": film.sex,
                    "age": film.age,
                    "modality": film.modality,
                    "body_part": film.body_part,
                },
            )
        ]

    def _look_at(self, scan: "_Scan", number: int, path: str) -> None:
        """Read the header of a file, or pass it over."""
        lower = path.lower()
        if lower.endswith(".txt"):
            scan.add_text(path)
            return
        try:
            with self.files.listed(path).open() as file:
                if not lower.endswith(_ENDINGS) and not is_dicom(file):
                    scan.others += 1
                    return
                header = read_header(file)
        except (DataError, OSError) as error:
            reason = str(error) if isinstance(error, DataError) else "cannot be read"
            scan.add_bad(number, path, reason)
            return
        if header.is_directory:
            scan.others += 1
        else:
            scan.add(number, path, header)

    def _reports_table(self) -> Join | None:
        """The table of --reports by study."""
        if self.options.reports is None:
            return None
        texts = self.open(self.options.reports.parent, "where the reports are kept", deep=False)
        table = texts.table(self.options.reports.name, columns=["StudyInstanceUID", "report"])
        join = self.join()
        join.add("report", table, key="StudyInstanceUID", unique=True)
        return join

    def _report(self, record: Record) -> str:
        if self.options.reports is not None:
            rows = record.joined["report"]
            text = rows[0]["report"] if rows else ""
            if not text:
                self.notes[_EMPTY_ROW if rows else _NO_ROW] += 1
            return text
        if not record["text"]:
            self.notes[_NONE_BESIDE] += 1
            return ""
        data = read_member(self.files.listed(_path(record["text"])), _REPORT_LIMIT)
        # Windows' Notepad writes "Unicode", which is UTF-16, with a mark.
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        try:
            text, latin = data.decode("utf-16" if utf16 else "utf-8-sig"), False
        except UnicodeDecodeError:
            text, latin = data.decode("latin-1"), True
        if "\0" in text:
            raise record.error("the text file with its report is no text")
        if not text.strip():
            self.notes[_EMPTY_TEXT] += 1
        if latin:
            self.notes[_LATIN] += 1
        return text.strip()


class _Scan:
    """What was found below the root, in a temporary SQLite file: headers, text files, studies of folders."""

    def __init__(self) -> None:
        self.others = 0
        self._database = sqlite3.connect("", isolation_level=None)
        for table in (
            "paths (path TEXT PRIMARY KEY) WITHOUT ROWID",
            "texts (folded TEXT PRIMARY KEY, path TEXT, used INTEGER) WITHOUT ROWID",
            "files (number INTEGER PRIMARY KEY, path TEXT, cells TEXT, problem TEXT)",
            "patient_of_study (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
            "study_of_folder (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
            "study_of_text (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
        ):
            self._database.execute(f"CREATE TABLE {table}")

    def add_text(self, path: str) -> None:
        """A text file, which may be a report."""
        self._see(path)
        row = (_code(path).casefold(), _code(path))
        if not self._database.execute("INSERT OR IGNORE INTO texts VALUES (?, ?, 0)", row).rowcount:
            raise DataError("two text files below --root differ in upper and lower case only; rename one")

    def add_bad(self, number: int, path: str, problem: str) -> None:
        """A file that should be DICOM and cannot be read."""
        self._see(path)
        self._database.execute("INSERT INTO files VALUES (?, ?, '', ?)", (number, _code(path), problem))

    def add(self, number: int, path: str, header: DicomHeader) -> None:
        """A DICOM file."""
        self._see(path)
        cells = {
            "patient": header.patient_id,
            "study": header.study_uid,
            "image": header.image_uid,
            "modality": header.modality,
            "raw": "1" if header.is_raw else "",
        }
        self._database.execute(
            "INSERT INTO files VALUES (?, ?, ?, '')", (number, _code(path), json.dumps(cells))
        )
        self._note("patient_of_study", header.study_uid, header.patient_id)
        for folder in PurePosixPath(_code(path)).parents:
            self._note("study_of_folder", str(folder), header.study_uid)
        for text in _texts_of(PurePosixPath(_code(path))):
            self._note("study_of_text", str(text).casefold(), header.study_uid)

    def records(self, with_files: bool) -> Iterator[Record]:
        """A record a file, in the order of their paths.

        Args:
            with_files: look for text files with reports.
        """
        for number, path, cells, problem in self._database.execute("SELECT * FROM files ORDER BY number"):
            if problem:
                yield Record("DICOM file", number, {}, problem=problem)
                continue
            found: dict[str, str] = json.loads(cells)
            mixed = "1" if self._noted("patient_of_study", found["study"]) == _SEVERAL else ""
            text = ""
            if with_files:
                try:
                    text = self._text(PurePosixPath(path), found["study"])
                except DataError as error:
                    yield Record("DICOM file", number, {}, problem=str(error))
                    continue
            yield Record("DICOM file", number, found | {"path": path, "text": text, "mixed": mixed})

    def remarks(self, with_files: bool) -> list[str]:
        """Files that were passed over, and text files that are nobody's."""
        lines = [f"{self.others:,} files that are no DICOM images were passed over"] if self.others else []
        if with_files:
            (unused,) = self._database.execute("SELECT count(*) FROM texts WHERE used = 0").fetchone()
            if unused:
                lines.append(f"{unused:,} text files are the report of no DICOM file by their names")
        return lines

    def _text(self, path: PurePosixPath, study: str) -> str:
        """The nearest text file with the report of an image, from its own name up to the root; or ""."""
        own = [name for name in _texts_of(path) if not self._is_of_other_study(name.stem, study)]
        names = list(own)
        for folder in path.parents:
            names += [folder / f"{study}.txt", folder / _REPORT]
        for name in names:
            key = str(name).casefold()
            query = "UPDATE texts SET used = 1 WHERE folded = ? RETURNING path"
            found = self._database.execute(query, (key,)).fetchone()
            if found is None:
                continue
            if name.stem == study:
                return str(found[0])
            if name in own and self._noted("study_of_text", key) == _SEVERAL:
                raise DataError(
                    "a text file is named like images of several studies; name it like the StudyInstanceUID"
                )
            if name not in own and self._noted("study_of_folder", str(name.parent)) == _SEVERAL:
                raise DataError(
                    f"{_REPORT} lies above files of several studies; name it like the image or the "
                    "StudyInstanceUID"
                )
            return str(found[0])
        return ""

    def _is_of_other_study(self, stem: str, study: str) -> bool:
        """Whether a text file of that name is the report of another study than this."""
        return stem != study and bool(self._noted("patient_of_study", stem))

    def _see(self, path: str) -> None:
        if not self._database.execute("INSERT OR IGNORE INTO paths VALUES (?)", (_code(path),)).rowcount:
            raise DataError(
                "two files below --root have one path, inside zips; unpack each in its own folder"
            )

    def _note(self, table: str, key: str, value: str) -> None:
        """Remember the one value of a key, or that it has several."""
        self._database.execute(
            f"INSERT INTO {table} VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = ?3 WHERE value != ?2",
            (key, value, _SEVERAL),
        )

    def _noted(self, table: str, key: str) -> str:
        row = self._database.execute(f"SELECT value FROM {table} WHERE key = ?", (key,)).fetchone()
        return row[0] if row else ""


def _texts_of(path: PurePosixPath) -> list[PurePosixPath]:
    """What a text file with the report of that image is named like.

    Only endings of images are cut: files named by UIDs have none, and `1.2.8` is not the name of `1.2.8.1`.
    """
    texts = [path.with_name(f"{path.name}.txt")]
    return texts + ([path.with_suffix(".txt")] if path.suffix.lower() in _ENDINGS else [])


def _code(path: str) -> str:
    """A path as text that can be stored: file names need not be Unicode."""
    return os.fsencode(path).decode("latin-1")


def _path(code: str) -> str:
    """The path of `_code`."""
    return os.fsdecode(code.encode("latin-1"))

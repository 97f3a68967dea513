"""Source: a table (CSV, TSV, JSONL, Parquet) beside a folder of images (JPEG, PNG, TIFF)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.archives.id_lists import UserLists
from shards.errors import DataError
from shards.format import hash_file
from shards.images import decode_turned, read_image_file, refuse_turned
from shards.sources.base import Json, RejectedRecord, Source, option
from shards.sources.image_paths import ImagePaths
from shards.sources.registry import register
from shards.sources.table_exclude import LeftOut
from shards.sources.table_groups import PatientGroups
from shards.sources.table_map import LabelRule, TableMap, label_rules, read_map
from shards.sources.table_splits import PatientSplits, stated_split
from shards.sources.table_targets import TargetReader, Targets
from shards.study import LabelValue, Study
from shards.tables.files import locate, open_bytes
from shards.tables.reading import read_rows
from shards.tables.rows import BadRow, CellReader, Row
from shards.tables.store import RowStore
from shards.text.sections import plain_text, split_sections
from shards.text.sentences import split_sentences

#: Changes when the same table and map give other samples, so that an old build is not gone on with.
_READING = 7
#: Labels of boxes become label names of the dataset.
_MOST_BOX_LABELS = 256
_LABEL_VALUES: dict[str, LabelValue] = {
    **{"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0},
    **{"-1": -1, "-1.0": -1, "": None},
}


@dataclass(frozen=True)
class TableOptions:
    """Options of `medvlp shards build table`."""

    table: Path = option("CSV, TSV, JSONL (also .gz) or Parquet file, one image a row")
    images: Path = option("folder that the table's image paths start from")
    map_file: Path = option("YAML that says what the columns mean", name="--map")
    exclude: list[Path] = option("file of patient, study or image ids to leave out (repeatable)", [])


@register("table", TableOptions)
def open_table(options: TableOptions, image_size: int) -> TableSource:
    """Build from a table of reports and a folder of images (see shards/sources/README.md)."""
    return TableSource(options.table, options.images, options.map_file, options.exclude)


class TableSource(Source):
    """One image a record; record numbers count the rows, or the images of `rows: target`, from 0.

    Args:
        table: the table; its ending names its kind.
        images: folder that image paths start from.
        map_file: YAML that names the columns (`shards.sources.table_map.TableMap`).
        exclude: files of patients, studies, ids or image paths, one a line; their rows are left out.

    Raises:
        DataError: table, folder, map or a file of ids cannot be used.
    """

    name = "table"

    def __init__(self, table: Path, images: Path, map_file: Path, exclude: Sequence[Path] = ()) -> None:
        if not images.is_dir():
            raise DataError(f"image folder {images} does not exist")
        self._table = locate(table)
        self._paths = ImagePaths(images)
        self._map = read_map(map_file)
        self._labels = label_rules(self._map)
        self.identifying = set(self._map.extra) & set(self._map.identifiers)
        self._targets = TargetReader(self._map.targets, self._paths)
        mapped = {key: value for key, value in asdict(self._map).items() if value not in (None, [])}
        with open_bytes(self._table):  # a clear error before the hash, which knows no kinds of files
            self.arguments: dict[str, Json] = {
                "table": self._table.name,
                "hash": hash_file(self._table),
                "map": mapped,
                "reading": _READING,
            }
        lists = UserLists([], exclude, str.strip)
        if exclude:
            self.arguments["exclude"] = lists.hashes["exclude"]
        left_out = LeftOut(self._map, lists)
        survey = _Survey(self._map, self._labels, self._paths, self._targets)
        rows = left_out.pass_on(read_rows(self._table, self._map.columns, self._map.format))
        self._rows = RowStore(survey.pass_on(rows), self._map.columns)
        if not len(self._rows):
            raise DataError(f"{table} has no rows")
        self._patient_groups, self._splits = survey.patient_groups, survey.splits
        self._groups = survey.groups() if self._map.targets.several else None
        self._duplicates = set() if self._map.targets.several else survey.duplicates()
        self._remarks = survey.remarks() + left_out.remarks()
        names = [*self._labels, *self._map.targets.findings, *survey.box_labels()]
        self.label_names = list(dict.fromkeys(names))

    @property
    def title(self) -> str:
        """The name of the table's file."""
        return self._table.name.partition(".")[0]

    def __len__(self) -> int:
        return len(self._rows) if self._groups is None else len(self._groups)

    def remarks(self) -> list[str]:
        """Rules of the map that no row of the table fits."""
        return self._remarks

    def take_notes(self) -> dict[str, int]:
        """What was done to find images and read masks since the last call -> how often."""
        notes = self._paths.notes + self._targets.notes
        self._paths.notes, self._targets.notes = Counter(), Counter()
        return dict(notes)

    def split_key(self, i: int) -> str:
        """Group of record `i`, which another row of its patient may name, else the patient.

        One without both, which `load` rejects, stands alone.
        """
        row = self._rows.read(self._numbers(i)[0], self._map.split_columns)
        if isinstance(row, BadRow):
            return f"row {i}"
        patient, group = row[self._map.patient_id], self._optional(row, self._map.group)
        if patient and not group and (number := self._patient_groups.row_of(patient)) is not None:
            named = self._rows.read(number, self._map.split_columns)
            assert isinstance(named, Row), "it was read when the table was surveyed"
            group = self._optional(named, self._map.group)
        return group or patient or f"row {i}"

    def prescribed_split(self, i: int) -> str | None:
        """Split that the table names for record `i`, its patient or group; None where it names none."""
        if self._map.split is None:
            return None
        row = self._rows.read(self._numbers(i)[0], [self._map.split, self._map.patient_id])
        if isinstance(row, BadRow):
            return None
        return stated_split(row, self._map.split) or self._splits.split_of(row[self._map.patient_id])

    def load(self, i: int) -> list[Study]:
        """The image of record `i` with its text and targets.

        Raises:
            RejectedRecord: its rows cannot be used.
        """
        rows: list[Row] = []
        for number in self._numbers(i):
            row = self._rows[number]
            if isinstance(row, BadRow):
                raise RejectedRecord(row.reason, i, row.line)
            rows.append(row)
        try:
            self._check(i, rows)
            return [self._study(rows)]
        except RejectedRecord as error:
            raise RejectedRecord(error.reason, i, error.line or rows[0].line) from error

    def _numbers(self, i: int) -> list[int]:
        """Numbers of the rows of record `i`."""
        return [i] if self._groups is None else self._groups[i]

    def _study(self, rows: list[Row]) -> Study:
        row = rows[0]
        sections = self._sections(row)
        if self._map.has_text and not sections:
            raise RejectedRecord("missing report")
        image, orientation = self._image(row[self._map.image])
        targets = self._targets.read(rows, row[self._map.image], image.shape)
        if targets.have_places:
            try:
                refuse_turned(orientation)
            except DataError as error:
                raise RejectedRecord(str(error)) from error
        return Study(
            study_id=self._optional(row, self._map.study_id) or row[self._map.id or self._map.image],
            patient_id=row[self._map.patient_id],
            labels=self._label_values(row, targets),
            image=image,
            view=self._optional(row, self._map.view).upper(),
            sections=sections,
            sentences=[sentence for text in sections.values() for sentence in split_sentences(text)],
            split=stated_split(row, self._map.split),
            source=self._map.source or self.title,
            license=self._optional(row, self._map.license),
            extra={column: row[column] for column in self._map.extra},
            **vars(targets),
        )

    def _label_values(self, row: Row, targets: Targets) -> dict[str, LabelValue]:
        """By the map; else 1 where there is a box or a mask has pixels, 0 where a mask has none."""
        values: dict[str, LabelValue] = {name: _label(rule, row) for name, rule in self._labels.items()}
        boxed = {box.label for box in targets.boxes}
        for name in self.label_names:
            if name not in self._labels:
                mask = targets.masks.get(name)
                empty = None if mask is None else int(mask.any())
                values[name] = 1 if name in boxed else empty
        return values

    def _check(self, i: int, rows: list[Row]) -> None:
        row = rows[0]
        free = self._map.targets.columns
        for other in rows[1:]:
            for name, cell in other.cells.items():
                if cell != row[name] and name not in free:
                    raise RejectedRecord(f"rows of one image differ in column {name!r}", line=other.line)
        required = {"image": self._map.image, "patient_id": self._map.patient_id, "id": self._map.id}
        for key, column in required.items():
            if column is not None and not row[column]:
                raise RejectedRecord(f"missing {key}")
        if i in self._duplicates:
            remedy = " (the map's rows: target joins the rows of one)" if self._map.targets.columns else ""
            raise RejectedRecord(f"duplicate {'id' if self._map.id else 'image'}{remedy}")
        if self._map.split and row[self._map.split] and stated_split(row, self._map.split) is None:
            raise RejectedRecord("split is not a word of letters, digits and underscores")

    def _sections(self, row: Row) -> dict[str, str]:
        how = (self._map.language, self._map.findings_without_heading)
        sections = split_sections(row[self._map.report], *how) if self._map.report else {}
        columns = {
            name: plain_text(row[column]).strip() for name, column in self._map.section_columns.items()
        }
        return sections | {name: text for name, text in columns.items() if text}

    def _image(self, name: str) -> tuple[NDArray[np.uint8], int]:
        try:
            return decode_turned(read_image_file(self._paths.find(name)))
        except OSError as error:
            raise RejectedRecord(f"image file cannot be read: {error.strerror}") from error
        except DataError as error:
            raise RejectedRecord(str(error)) from error

    @staticmethod
    def _optional(row: Row, column: str | None) -> str:
        return row[column] if column is not None else ""


def _label(rule: LabelRule, row: Row) -> LabelValue:
    cell = row[rule.column]
    if rule.text is not None:
        return int(rule.text in rule.texts(cell)) if cell else None
    value = cell.lower()
    if value not in _LABEL_VALUES:
        raise RejectedRecord(f"label column {rule.column!r} holds neither 1, 0, -1 nor nothing")
    return _LABEL_VALUES[value]


class _Groups:
    """Numbers of the rows that share an identifier, by the order in which these first appear."""

    def __init__(self, identifiers: NDArray[np.void]) -> None:
        _, first, group = np.unique(identifiers, return_index=True, return_inverse=True)
        place = np.empty(len(first), np.int64)
        place[np.argsort(first)] = np.arange(len(first))
        self._rows = np.argsort(place[group], kind="stable")
        self._ends = np.cumsum(np.bincount(place[group], minlength=len(first)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> list[int]:
        rows: list[int] = self._rows[self._ends[i - 1] if i else 0 : self._ends[i]].tolist()
        return rows


class _Survey:
    """What only the whole table shows, collected while its rows pass by: duplicates, rules that never fit."""

    def __init__(
        self, table_map: TableMap, labels: dict[str, LabelRule], paths: ImagePaths, targets: TargetReader
    ) -> None:
        self._targets = targets
        self._box_labels: set[str] = set()
        #: Kind of boxes -> how far right or down any of them ends.
        self._farthest: dict[str, float] = {}
        self.patient_groups = PatientGroups(table_map)
        self.splits = PatientSplits(table_map, self.patient_groups)
        self._several = table_map.targets.several
        self._image = table_map.image
        self._identifier = table_map.id or table_map.image
        self._is_path = table_map.id is None
        self._paths = paths
        self._cells = CellReader(table_map.encoding, table_map.format.missing)
        self._rules = {name: rule for name, rule in labels.items() if rule.text is not None}
        self._matches: Counter[str] = Counter()
        #: Rows that count as 0 but hold the text in another spelling.
        self._almost: Counter[str] = Counter()
        # 16 bytes a row instead of its identifier.
        self._digests = bytearray()

    def pass_on(self, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
        """The same rows, looked at."""
        for number, row in enumerate(rows):
            identifier = ""
            if isinstance(row, Row):
                identifier = row[self._identifier]
                self._count(row)
                self._see_places(row)
                self.patient_groups.see(number, row)
                self.splits.see(row)
            if self._several and not identifier:
                reason = row.reason if isinstance(row, BadRow) else "the row names no image"
                raise DataError(
                    f"line {row.line}: {reason}; which image it tells of cannot be known (rows: target), so "
                    "that one would be stored with a part of its targets; mend the row"
                )
            # A row without an identifier is rejected for that, and is no duplicate of another such row.
            key = f"={self._paths.identity(identifier) if self._is_path else identifier}"
            key = key if identifier else f"{number}"
            self._digests += hashlib.blake2b(key.encode(), digest_size=16).digest()
            yield row
        self._targets.have_seen()
        self.patient_groups.have_seen()
        self.splits.have_seen()
        for kind, farthest in self._farthest.items():
            if farthest <= 1:
                raise DataError(
                    f"all boxes of {kind} lie within the first pixel of their images: the map's boxes are in "
                    "pixels of the image file, not shares of its sides"
                )

    def duplicates(self) -> set[int]:
        """Rows whose identifier an earlier row has."""
        digests = np.frombuffer(bytes(self._digests), dtype="V16")
        _, first = np.unique(digests, return_index=True)
        repeated = np.ones(len(digests), bool)
        repeated[first] = False
        return set(np.flatnonzero(repeated).tolist())

    def groups(self) -> _Groups:
        """Rows of each image, in the order of the table."""
        return _Groups(np.frombuffer(bytes(self._digests), dtype="V16"))

    def box_labels(self) -> list[str]:
        """Labels of all boxes of findings, sorted."""
        return sorted(self._box_labels)

    def remarks(self) -> list[str]:
        """A line for each rule that some rows almost fit or none does, and for groups that are divided."""
        lines = []
        for name, rule in self._rules.items():
            how = "equals" if rule.contains is None else "contains"
            line = f"label {name!r}: no row's {rule.column!r} {how} {rule.text!r}"
            almost = f"{self._almost[name]:,} rows hold it in another spelling (capitals, separators)"
            if self._matches[name] and self._almost[name]:
                lines.append(f"label {name!r} {how} {rule.text!r}: {almost}, and count as absent")
            elif not self._matches[name] and self._cells.is_missing(rule.text or ""):
                lines.append(f"{line}; it is a word for missing (set `missing` in the map)")
            elif not self._matches[name]:
                lines.append(f"{line}; {almost}" if self._almost[name] else line)
        return lines + self.splits.remarks()

    def _see_places(self, row: Row) -> None:
        self._targets.see(row[self._image])
        for kind, boxes in self._targets.boxes_of(row).items():
            self._box_labels.update(box.label for box in boxes if kind == "boxes")
            ends = [max(box.x + box.width, box.y + box.height) for box in boxes]
            if ends:
                self._farthest[kind] = max(self._farthest.get(kind, 0.0), *ends)
        if len(self._box_labels) > _MOST_BOX_LABELS:
            raise DataError(
                f"line {row.line}: boxes have more than {_MOST_BOX_LABELS} different labels; "
                "does the map name the column of their labels?"
            )

    def _count(self, row: Row) -> None:
        for name, rule in self._rules.items():
            cell = row[rule.column]
            fits = rule.text in rule.texts(cell)
            self._matches[name] += fits
            self._almost[name] += not fits and rule.almost_fits(cell)

"""Source: a table (CSV, TSV, JSONL, Parquet) beside a folder of images (JPEG, PNG, TIFF)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format import hash_file
from shards.images import decode_image
from shards.sources.base import Json, RejectedRecord, Source, option
from shards.sources.registry import register
from shards.sources.table_map import LabelRule, label_rules, read_map
from shards.sources.table_rows import BadRow, Row, is_text, read_rows
from shards.splits import normalise_split
from shards.study import LabelValue, Study
from shards.text.sections import plain_text, split_sections
from shards.text.sentences import split_sentences

_LABEL_VALUES: dict[str, LabelValue] = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": None}


@dataclass(frozen=True)
class TableOptions:
    """Options of `medvlp shards build table`."""

    table: Path = option("CSV, TSV, JSONL or Parquet file, one image a row")
    images: Path = option("folder that the table's image paths start from")
    map_file: Path = option("YAML that says what the columns mean", name="--map")


@register("table", TableOptions)
def open_table(options: TableOptions, image_size: int) -> TableSource:
    """Build from a table of reports and a folder of images (see shards/sources/README.md)."""
    return TableSource(options.table, options.images, options.map_file)


class TableSource(Source):
    """One record a row, one image a record; record numbers count the rows from 0 without the header.

    Args:
        table: the table; its ending names its kind.
        images: folder that image paths start from.
        map_file: YAML that names the columns (`shards.sources.table_map.TableMap`).

    Raises:
        DataError: table, folder or map cannot be used.
    """

    name = "table"

    def __init__(self, table: Path, images: Path, map_file: Path) -> None:
        if not images.is_dir():
            raise DataError(f"image folder {images} does not exist")
        self._table = table
        self._images = images
        self._map = read_map(map_file)
        self._labels = label_rules(self._map)
        self.label_names = list(self._labels)
        self._length = len(self._rows)
        mapped = {key: value for key, value in asdict(self._map).items() if value not in (None, [])}
        self.arguments: dict[str, Json] = {"table": table.name, "hash": hash_file(table), "map": mapped}

    @property
    def title(self) -> str:
        """The name of the table's file."""
        return self._table.stem

    def __len__(self) -> int:
        return self._length

    def split_key(self, i: int) -> str:
        """Group or patient of row `i`; a row without one, which `load` rejects, stands alone."""
        row = self._rows[i]
        key = "" if isinstance(row, BadRow) else row[self._map.group or self._map.patient_id]
        return key or f"row {i}"

    def prescribed_split(self, i: int) -> str | None:
        """Split the table names for row `i`; None where the cell is empty or cannot be a name."""
        row = self._rows[i]
        if isinstance(row, BadRow) or self._map.split is None or not row[self._map.split]:
            return None
        try:
            return normalise_split(row[self._map.split])
        except ValueError:
            return None

    def load(self, i: int) -> list[Study]:
        """The image of row `i` with its text.

        Raises:
            RejectedRecord: the row cannot be used.
        """
        row = self._checked_row(i)
        sections = self._sections(row)
        if self._map.has_text and not sections:
            raise RejectedRecord("missing report", i)
        labels = {name: self._label(rule, row) for name, rule in self._labels.items()}
        identifier = row[self._map.id or self._map.image]
        return [
            Study(
                study_id=self._optional(row, self._map.study_id) or identifier,
                patient_id=row[self._map.patient_id],
                image=self._image(row[self._map.image]),
                view=self._optional(row, self._map.view).upper(),
                sections=sections,
                sentences=[sentence for text in sections.values() for sentence in split_sentences(text)],
                labels=labels,
                split=self.prescribed_split(i),
                source=self._map.source or self._table.stem,
                license=self._optional(row, self._map.license),
                extra={column: row[column] for column in self._map.extra},
            )
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: a building process reads the table itself, which is faster than sending it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_rows", "_duplicates")}

    @cached_property
    def _rows(self) -> list[Row | BadRow]:
        return read_rows(self._table, self._map.columns, self._map.encoding)

    @cached_property
    def _duplicates(self) -> set[int]:
        """Rows whose identifier an earlier row has."""
        seen: set[str] = set()
        duplicates = set()
        for i, row in enumerate(self._rows):
            if isinstance(row, BadRow):
                continue
            identifier = row[self._map.id or self._map.image]
            if identifier in seen:
                duplicates.add(i)
            seen.add(identifier)
        return duplicates

    def _checked_row(self, i: int) -> Row:
        row = self._rows[i]
        if isinstance(row, BadRow):
            raise RejectedRecord(row.reason, i)
        for column, value in row.items():
            if not is_text(value):
                encoding = self._map.encoding
                raise RejectedRecord(
                    f"column {column!r} is not {encoding} text (set `encoding` in the map)", i
                )
        required = {"image": self._map.image, "patient_id": self._map.patient_id, "id": self._map.id}
        for key, required_column in required.items():
            if required_column is not None and not row[required_column]:
                raise RejectedRecord(f"missing {key}", i)
        if i in self._duplicates:
            raise RejectedRecord(f"duplicate {'id' if self._map.id else 'image'}", i)
        if self._map.split and row[self._map.split] and self.prescribed_split(i) is None:
            raise RejectedRecord("split is not a word of letters, digits and underscores", i)
        return row

    def _sections(self, row: Row) -> dict[str, str]:
        how = (self._map.language, self._map.findings_without_heading)
        sections = split_sections(row[self._map.report], *how) if self._map.report else {}
        columns = {
            name: plain_text(row[column]).strip() for name, column in self._map.section_columns.items()
        }
        return sections | {name: text for name, text in columns.items() if text}

    @staticmethod
    def _label(rule: LabelRule, row: Row) -> LabelValue:
        value = row[rule.column]
        if rule.equals is not None:
            return int(value == rule.equals) if value else None
        if value not in _LABEL_VALUES:
            raise RejectedRecord(f"label column {rule.column!r} holds neither 1, 0, -1 nor nothing")
        return _LABEL_VALUES[value]

    def _image(self, name: str) -> NDArray[np.uint8]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise RejectedRecord("image path leaves the image folder")
        try:
            return decode_image((self._images / path).read_bytes())
        except FileNotFoundError as error:
            raise RejectedRecord("image file does not exist") from error
        except OSError as error:
            raise RejectedRecord(f"image file cannot be read: {error.strerror}") from error
        except DataError as error:
            raise RejectedRecord(str(error)) from error

    @staticmethod
    def _optional(row: Row, column: str | None) -> str:
        return row[column] if column is not None else ""

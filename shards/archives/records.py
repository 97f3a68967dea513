"""A row of an archive's table with the rows of other tables that belong to it, and what its cells mean."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from shards.errors import DataError
from shards.sources.base import RejectedRecord
from shards.splits import SPLITS, normalise_split
from shards.study import Box, LabelValue

_LABEL_VALUES: dict[str, LabelValue] = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": None}


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        file, line: where it stands, line from 1 (of a JSON list: the number of its item).
        cells: column -> text, stripped; "" where it is missing.
        joined: name -> rows of another table that belong to it, in that table's order.
        problem: why the row could not be read; then it has no cells.
    """

    file: str
    line: int
    cells: dict[str, str]
    joined: dict[str, list[Record]] = field(default_factory=dict)
    problem: str = ""

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def error(self, reason: str) -> RejectedRecord:
        """The rejection of this row; `reason` holds nothing of its text."""
        return RejectedRecord(f"{self.file}: {reason}", line=self.line)

    def text(self, column: str) -> str:
        """A cell that must not be empty.

        Raises:
            RejectedRecord: it is.
        """
        if not self[column]:
            raise self.error(f"column {column!r} is empty")
        return self[column]

    def number(self, column: str) -> float:
        """A finite number.

        Raises:
            RejectedRecord: the cell holds none.
        """
        try:
            number = float(self[column])
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"column {column!r} holds no number")
        return number

    def label(self, column: str) -> LabelValue:
        """1, 0, -1 (uncertain), or None where the cell is empty.

        Raises:
            RejectedRecord: it holds something else.
        """
        if self[column] not in _LABEL_VALUES:
            raise self.error(f"column {column!r} holds neither 1, 0, -1 nor nothing")
        return _LABEL_VALUES[self[column]]

    def split(self, column: str) -> str:
        """ "train", "valid" or "test", whatever word stands for it.

        Raises:
            RejectedRecord: the cell holds something else.
        """
        try:
            name = normalise_split(self[column])
        except ValueError:
            name = ""
        if name not in SPLITS:
            raise self.error(f"column {column!r} holds no split")
        return name

    def box(self, label: str, x: str, y: str, width: str, height: str) -> Box:
        """A box whose left, top, width and height stand in these columns, in pixels of the original image.

        Raises:
            RejectedRecord: one of them is no number, or a side is negative.
        """
        box = Box(label, self.number(x), self.number(y), self.number(width), self.number(height))
        if box.width < 0 or box.height < 0:
            raise self.error(f"column {width if box.width < 0 else height!r} is negative")
        return box

    def to_json(self) -> str:
        """Text from which `from_json` makes an equal record."""
        return json.dumps(self._fields(), ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Record:
        """The record of `to_json`."""
        return _from_fields(json.loads(text))

    def _fields(self) -> list[Any]:
        joined = {name: [row._fields() for row in rows] for name, rows in self.joined.items()}
        return [self.file, self.line, self.cells, joined, self.problem]


def _from_fields(fields: list[Any]) -> Record:
    file, line, cells, joined, problem = fields
    rows = {name: [_from_fields(row) for row in listed] for name, listed in joined.items()}
    return Record(file, line, cells, rows, problem)


def object_records(
    value: Any, file: str, fields: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Record]:
    """Records of a JSON list of objects; `line` is the number of the item, from 1.

    Text is stripped, null is ""; what is no text is its JSON. An item that is no object, or lacks one of
    `fields`, is a `Record` with a `problem`.

    Raises:
        DataError: `value` is no list; `file` is what the message calls it.
    """
    if not isinstance(value, list):
        raise DataError(f"{file} holds no list of objects; is it another file of that name?")
    for number, item in enumerate(value, start=1):
        missing = [name for name in fields if not isinstance(item, dict) or name not in item]
        if missing:
            yield Record(file, number, {}, problem=f"an item is no object with {missing[0]!r}")
        else:
            yield Record(file, number, {name: _text(item.get(name)) for name in (*fields, *optional)})


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


Key = str | Callable[[Record], str]


class Rows(Protocol):
    """Rows that can be joined: a `Table`, or what an importer makes of a file that is none."""

    @property
    def name(self) -> str:
        """Of their file, for messages."""

    def __iter__(self) -> Iterator[Record]: ...

    def again(self) -> str:
        """What to do about a damaged file."""


class Join:
    """Tables by key in a temporary SQLite file, which takes bounded memory and vanishes with the process.

    ```python
    join = Join()
    join.add("boxes", boxes, key="Image Index")
    for record in join.records(images, boxes="Image Index"):
        record.joined["boxes"]
    ```
    """

    def __init__(self) -> None:
        self._database = temporary_database()
        self._tables: dict[str, Rows] = {}

    def add(self, name: str, table: Rows, key: Key, *, unique: bool = False) -> None:
        """Take in a table; `unique`: a key that it has twice is an error.

        Raises:
            DataError: a row cannot be read or placed (which record it belongs to cannot be known), or a key
                is there twice.
        """
        self._tables[name] = table
        with _room():
            self._database.execute(f'CREATE TABLE "{name}" (key TEXT, record TEXT)')
            self._database.executemany(f'INSERT INTO "{name}" VALUES (?, ?)', self._rows(table, key))
            self._database.execute(f'CREATE INDEX "{name} by key" ON "{name}" (key)')
            self._database.execute(f'CREATE TABLE "{name} used" (key TEXT PRIMARY KEY) WITHOUT ROWID')
            if unique:
                self._check_unique(name, table)

    def records(self, table: Iterable[Record], **keys: Key) -> Iterator[Record]:
        """The rows of a table, each with the rows of the named tables whose key is that of the row."""
        with _room():
            for record in table:
                if not record.problem:
                    for name, key in keys.items():
                        record.joined[name] = self._lookup(name, _key_of(record, key))
                yield record

    def count(self, name: str) -> int:
        """Rows of a table that was taken in."""
        count: int = self._database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
        return count

    def unused(self) -> dict[str, int]:
        """File name of a table -> number of its rows that no record asked for, where there are any."""
        counts = {}
        for name, table in self._tables.items():
            query = f'SELECT count(*) FROM "{name}" WHERE key NOT IN (SELECT key FROM "{name} used")'
            counts[table.name] = self._database.execute(query).fetchone()[0]
        return {name: count for name, count in counts.items() if count}

    def _lookup(self, name: str, key: str) -> list[Record]:
        query = f'SELECT record FROM "{name}" WHERE key = ? ORDER BY rowid'
        found = [Record.from_json(text) for (text,) in self._database.execute(query, (key,))]
        if found:
            self._database.execute(f'INSERT OR IGNORE INTO "{name} used" VALUES (?)', (key,))
        return found

    @staticmethod
    def _rows(table: Rows, key: Key) -> Iterator[tuple[str, str]]:
        for record in table:
            where = f"{table.name}, line {record.line}"
            if record.problem:
                raise DataError(f"{where}: {record.problem}; {table.again()}")
            value = _key_of(record, key)
            if not value:
                column = f"column {key!r}" if isinstance(key, str) else "the key"
                raise DataError(f"{where}: {column} is empty; {table.again()}")
            yield value, record.to_json()

    def _check_unique(self, name: str, table: Rows) -> None:
        query = f'SELECT record FROM "{name}" GROUP BY key HAVING count(*) > 1 LIMIT 1'
        twice = self._database.execute(query).fetchone()
        if twice is not None:
            line = Record.from_json(twice[0]).line
            raise DataError(
                f"{table.name}: what line {line} is about stands in another line too; {table.again()}"
            )


def temporary_database() -> sqlite3.Connection:
    """An empty SQLite database on disk that vanishes with its connection.

    The empty name is SQLite's own kind of temporary database. All that is done in it is one transaction that
    is never committed, since one for each row would take longer than the row.
    """
    database = sqlite3.connect("", isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("BEGIN")
    return database


def _key_of(record: Record, key: Key) -> str:
    return record[key] if isinstance(key, str) else key(record)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise DataError(
            f"cannot join the archive's tables ({error}); set TMPDIR to a folder with room for them"
        ) from error

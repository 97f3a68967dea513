"""Rows of a table in a temporary file, from which every process of a build takes any of them by its number.

A table is read once, whatever its kind; memory does not grow with it, and processes share the file's pages.
"""

import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.ipc

from shards.errors import DataError
from shards.tables.rows import BadRow, Row

_BATCH_ROWS = 2048
_BATCH_CHARACTERS = 1 << 24
_LINE, _REASON = "line", "reason"


class RowStore:
    """Rows by number, good and bad ones, in the order of the table.

    The file holds the table's text, so it must not stay behind: it has no name and vanishes with the process
    that wrote it, killed or not. A pickled store opens it through that process, which must be alive (Linux).

    Args:
        rows: all rows, each with `columns`.
        columns: columns that are kept.

    Raises:
        DataError: there is no room in the temporary folder ($TMPDIR), or as `rows` does.
    """

    def __init__(self, rows: Iterable[Row | BadRow], columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._places = {column: place for place, column in enumerate(self._columns, 2)}
        #: Number of the first row of each batch.
        self._starts: list[int] = []
        self._length = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the store
        self._path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        self._open: tuple[Any, int, pyarrow.RecordBatch] | None = None
        # By place, not by name: columns of a table may be called anything.
        names = [_LINE, _REASON, *(f"{place}" for place in range(len(self._columns)))]
        types = [pyarrow.int64(), *(pyarrow.large_string() for _ in names[1:])]
        schema = pyarrow.schema(list(zip(names, types, strict=True)))
        try:
            with pyarrow.ipc.new_file(self._file, schema) as writer:
                for batch in _batches(rows):
                    self._starts.append(self._length)
                    self._length += len(batch)
                    writer.write_batch(self._record_batch(batch, schema))
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"cannot keep the table's rows in {tempfile.gettempdir()}: {error.strerror or error}; "
                "set TMPDIR to a folder with room for the table"
            ) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Row | BadRow:
        return self.read(i, self._columns)

    def read(self, i: int, columns: Sequence[str]) -> Row | BadRow:
        """Row `i`, reduced to some of the store's columns."""
        if not 0 <= i < self._length:
            raise IndexError(i)
        number = bisect_right(self._starts, i) - 1
        batch = self._batch(number)
        place = i - self._starts[number]
        line = batch.column(0)[place].as_py()
        reason = batch.column(1)[place].as_py()
        if reason is not None:
            return BadRow(line, reason)
        return Row(line, {c: batch.column(self._places[c])[place].as_py() for c in columns})

    def __iter__(self) -> Iterator[Row | BadRow]:
        return (self[i] for i in range(self._length))

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which a process cannot send."""
        return {name: value for name, value in self.__dict__.items() if name != "_file"} | {"_open": None}

    def _batch(self, number: int) -> pyarrow.RecordBatch:
        """One batch, mapped into memory; the last one stays open."""
        if self._open is None:
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(self._path))
            self._open = reader, number, reader.get_batch(number)
        reader, opened, batch = self._open
        if opened != number:
            batch = reader.get_batch(number)
            self._open = reader, number, batch
        return batch

    def _record_batch(self, rows: list[Row | BadRow], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
        columns: list[list[Any]] = [
            [row.line for row in rows],
            [row.reason if isinstance(row, BadRow) else None for row in rows],
        ]
        for column in self._columns:
            columns.append([None if isinstance(row, BadRow) else row[column] for row in rows])
        arrays = [pyarrow.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
        return pyarrow.record_batch(arrays, schema=schema)


def _batches(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    """Rows in groups of bounded number and size."""
    group: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        group.append(row)
        characters += sum(map(len, row.cells.values())) if isinstance(row, Row) else 0
        if len(group) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group

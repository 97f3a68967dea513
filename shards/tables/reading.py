"""Reads any kind of table as rows of text: the one place through which tables come in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError, nearest
from shards.tables import delimited, json_lines, parquet
from shards.tables.files import TableFile, check_encoding, locate, open_text, table_kind
from shards.tables.rows import MISSING_WORDS, BadRow, CellReader, Row

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_DELIMITER_WORDS = {"tab": "\t", "\\t": "\t"}
KINDS = ".csv, .tsv, .jsonl (each also .gz) or .parquet"


@dataclass(frozen=True)
class TableFormat:
    """How a table is written, where its name does not say it.

    Attributes:
        encoding: encoding of its text; a byte order mark is skipped, one that contradicts is an error.
        delimiter: sign between the cells of a `.csv` or `.tsv`, "tab" for a tab; None: by the name's ending.
        missing: words that mean "no value" (`rows.MISSING_WORDS`).
        key: column whose cells have one form in all rows (an image path, an id), by which a row that a stray
            quote has drawn into a cell is recognised; None: the first column.
        name_columns: the cells of a header as they stand -> as many names; None: they are the names.
        nested: columns of JSON lines whose lists and objects are given as JSON text, numbers as strings.
    """

    encoding: str = "utf-8"
    delimiter: str | None = None
    missing: tuple[str, ...] = MISSING_WORDS
    key: str | None = None
    name_columns: Callable[[list[str]], list[str]] | None = None
    nested: tuple[str, ...] = ()

    def separator(self, kind: str) -> str:
        """The delimiter of a table of this kind.

        Raises:
            ValueError: it is no single sign.
        """
        if self.delimiter is None:
            return _DELIMITERS[kind]
        sign = _DELIMITER_WORDS.get(self.delimiter, self.delimiter)
        if len(sign) != 1 or sign in '"\r\n\0':
            raise ValueError(f"delimiter {self.delimiter!r} is not one sign, or a quote or line end")
        return sign


def read_rows(
    table: TableFile, columns: Sequence[str] | None = None, form: TableFormat | None = None
) -> Iterator[Row | BadRow]:
    """All rows of a table, one at a time, without stopping at a bad one.

    Args:
        table: path, or member of an archive: `.csv`, `.tsv`, `.jsonl`, `.ndjson`, each also with ".gz" (which
            a path may leave out or add), or `.parquet` (a path).
        columns: columns to read; None: all.
        form: how it is written; default: UTF-8, by the name's ending.

    Raises:
        DataError: the file cannot be read, its kind is unknown, its header is broken, or it lacks a column.
    """
    form = form or TableFormat()
    table, kind = locate(table) if isinstance(table, Path) else table, table_kind(table)
    cells = CellReader(form.encoding, form.missing)
    try:
        check_encoding(form.encoding)
        if kind in _DELIMITERS:
            yield from _delimited(table, columns, form, cells)
            return
        if form.delimiter is not None:
            raise DataError(f"{table}: only a .csv or .tsv has a delimiter")
    except ValueError as error:
        raise DataError(f"{table}: {error}") from error
    if kind in _JSON_LINES:
        yield from _json_lines(table, columns, form, cells)
    elif isinstance(table, Path) and table.suffix.lower() == ".parquet":
        yield from _parquet(table, columns, form, cells)
    else:
        raise DataError(f"{table}: a table is a {KINDS} file")


def _delimited(
    table: TableFile, columns: Sequence[str] | None, form: TableFormat, cells: CellReader
) -> Iterator[Row | BadRow]:
    delimiter = form.separator(table_kind(table))
    with open_text(table, form.encoding) as file:
        records = delimited.read_records(file, table, delimiter, form.key, form.name_columns)
        header = next(records)
        assert isinstance(header, delimited.Record), "the header comes first, or an error"
        wanted = header.cells if columns is None else columns
        _check_columns(table, wanted, header.cells, _delimiter_hint(header.cells))
        positions = {column: header.cells.index(column) for column in wanted}
        for record in records:
            if isinstance(record, BadRow):
                yield record
            else:
                raw = {column: record.cells[position] for column, position in positions.items()}
                yield cells.row(record.line, raw)


def _delimiter_hint(header: list[str]) -> str:
    signs = [sign for sign in ";\t|," if len(header) == 1 and sign in header[0]]
    return f" (set `delimiter: {'tab' if signs[0] == chr(9) else signs[0]!r}`?)" if signs else ""


def _json_lines(
    table: TableFile, columns: Sequence[str] | None, form: TableFormat, cells: CellReader
) -> Iterator[Row | BadRow]:
    seen: dict[str, None] = {}
    complete = False
    with open_text(table, form.encoding) as file:
        for fields in json_lines.read_objects(file, table, columns, form.nested):
            if isinstance(fields, BadRow):
                yield fields
                continue
            if not complete:
                seen |= dict.fromkeys(fields.cells)
                complete = columns is not None and len(seen) == len(set(columns))
            absent = dict.fromkeys(columns or ())
            yield cells.row(fields.line, absent | fields.cells)
    if columns is not None:
        _check_columns(table, columns, list(seen), " in any line")


def _parquet(
    table: Path, columns: Sequence[str] | None, form: TableFormat, cells: CellReader
) -> Iterator[Row | BadRow]:
    try:
        names = parquet.column_names(table)
        wanted = names if columns is None else columns
        _check_columns(table, wanted, names)
        number = 0
        for batch in parquet.read_batches(table, wanted, form.encoding):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield cells.row(number, dict(zip(batch, values, strict=True)))
    except OSError as error:
        raise DataError(f"cannot read {table}: {error.strerror or error}") from error


def _check_columns(table: TableFile, columns: Sequence[str], header: list[str], hint: str = "") -> None:
    for column in columns:
        if column not in header:
            raise DataError(f"{table} has no column {column!r}{nearest(column, header)}{hint}")
        if header.count(column) > 1:
            raise DataError(f"{table} has column {column!r} more than once")

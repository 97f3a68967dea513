"""Reads the rows of a CSV, TSV, JSONL or Parquet file as text, without stopping at a bad one."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from shards.errors import DataError
from shards.sources.table_map import nearest

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Bytes that are no text in the given encoding survive as lone surrogates, so that one bad row can be told
# from the good ones.
_BAD_BYTES = "surrogateescape"


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read."""

    reason: str


#: Column -> text; empty where the cell is.
Row = dict[str, str]


def read_rows(table: Path, columns: list[str], encoding: str) -> list[Row | BadRow]:
    """All rows of `table`, reduced to `columns`.

    Raises:
        DataError: the file cannot be read, its kind is unknown, or it lacks a column.
    """
    kind = table.suffix.lower()
    try:
        if kind in _DELIMITERS:
            rows = list(_read_delimited(table, columns, encoding, _DELIMITERS[kind]))
        elif kind in (".jsonl", ".ndjson"):
            rows = _read_json_lines(table, columns, encoding)
        elif kind == ".parquet":
            rows = _read_parquet(table, columns)
        else:
            raise DataError(f"{table}: a table is a .csv, .tsv, .jsonl or .parquet file")
    except OSError as error:
        raise DataError(f"cannot read table {table}: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{table} has no rows")
    return rows


def is_text(value: str) -> bool:
    """Whether all bytes of a cell were text in the table's encoding."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _read_delimited(table: Path, columns: list[str], encoding: str, delimiter: str) -> Iterator[Row | BadRow]:
    """The standard library's reader: pandas guesses types and stops at the first undecodable byte."""
    encoding = "utf-8-sig" if encoding.lower().replace("_", "-") == "utf-8" else encoding
    with table.open(encoding=encoding, errors=_BAD_BYTES, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, [])
            _check_columns(table, columns, header)
            positions = {column: header.index(column) for column in columns}
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    yield BadRow(f"row has {len(cells)} cells, the header {len(header)}")
                else:
                    yield {column: cells[position].strip() for column, position in positions.items()}
        except csv.Error as error:
            raise DataError(f"{table}, line {reader.line_num}: {error}") from error


def _read_json_lines(table: Path, columns: list[str], encoding: str) -> list[Row | BadRow]:
    rows: list[Row | BadRow] = []
    seen: set[str] = set()
    with table.open(encoding=encoding, errors=_BAD_BYTES, newline="\n") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError:
                fields = None
            if isinstance(fields, dict):
                seen |= fields.keys()
                rows.append(_row_of(fields, columns))
            else:
                rows.append(BadRow("line is not a JSON object"))
    _check_columns(table, columns, sorted(seen))
    return rows


def _read_parquet(table: Path, columns: list[str]) -> list[Row | BadRow]:
    try:
        _check_columns(table, columns, pyarrow.parquet.read_schema(table).names)
        fields = pyarrow.parquet.read_table(table, columns=columns).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{table} is not a Parquet file: {error}") from error
    return [_row_of(row, columns) for row in fields]


def _row_of(fields: dict[str, Any], columns: list[str]) -> Row | BadRow:
    values = {column: fields.get(column) for column in columns}
    for column, value in values.items():
        if isinstance(value, dict | list):
            return BadRow(f"column {column!r} holds more than one value")
    return {column: "" if value is None else str(value).strip() for column, value in values.items()}


def _check_columns(table: Path, columns: list[str], header: list[str]) -> None:
    for column in columns:
        if column not in header:
            raise DataError(f"{table} has no column {column!r}{nearest(column, header)}")
        if header.count(column) > 1:
            raise DataError(f"{table} has column {column!r} more than once")

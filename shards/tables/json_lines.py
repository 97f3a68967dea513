"""Rows of a JSON-lines file: one object a line, numbers and words as they were written."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from shards.errors import DataError
from shards.tables.files import MAX_RECORD, TableFile
from shards.tables.rows import BadRow


class _RepeatedFieldError(ValueError):
    """An object names a field twice: which of the two is meant cannot be known."""


class Fields(NamedTuple):
    """Fields of a line's object as text; None is null or NaN. Line from 1."""

    line: int
    cells: dict[str, str | None]


def read_objects(
    file: TextIO, table: TableFile, columns: Sequence[str] | None, nested: Sequence[str] = ()
) -> Iterator[Fields | BadRow]:
    """The object of every line that is not blank, reduced to `columns` (None: all fields of each).

    Lists and objects in columns of `nested` become JSON text again, with their numbers as strings.
    """
    number = 0
    while line := _read_line(file, table, number + 1):
        number += 1
        if not line.strip():
            continue
        try:
            fields = _DECODER.decode(line.strip())
        except _RepeatedFieldError:
            yield BadRow(number, "line names a field twice")
            continue
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            yield BadRow(number, "line is not a JSON object")
            continue
        yield _fields(number, fields, columns, nested)


def _read_line(file: TextIO, table: TableFile, number: int) -> str:
    # Read with every kind of line end, but JSON lines end in "\n" alone: "\r" inside one is white space.
    parts: list[str] = []
    size = 0
    while part := file.readline(MAX_RECORD + 1):
        parts.append(part)
        size += len(part)
        if size > MAX_RECORD:
            raise DataError(f"{table}, line {number}: longer than {MAX_RECORD:,} characters; is it a table?")
        if part.endswith("\n"):
            break
    return "".join(parts)


def _fields(
    number: int, fields: dict[str, Any], columns: Sequence[str] | None, nested: Sequence[str]
) -> Fields | BadRow:
    cells: dict[str, str | None] = {}
    for column in fields if columns is None else columns:
        if column not in fields:
            continue
        value = fields[column]
        if isinstance(value, dict | list):
            if column in nested:
                cells[column] = json.dumps(value, ensure_ascii=False)
                continue
            return BadRow(number, f"column {column!r} holds more than one value")
        cells[column] = _text(value)
    return Fields(number, cells)


def _text(value: str | bool | None) -> str | None:
    """Text as JSON writes it; numbers are text already."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value


def _constant(word: str) -> str | None:
    return None if word == "NaN" else word


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _RepeatedFieldError
    return fields


# Numbers stay the text they are written as: 1e5, 12.0 and 20-digit ids lose nothing.
_DECODER = json.JSONDecoder(
    parse_float=str, parse_int=str, parse_constant=_constant, object_pairs_hook=_unique_fields
)

"""Rows of a Parquet file as text, streamed batch by batch."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pyarrow.types

from shards.errors import DataError

_BATCH_ROWS = 4096
_ZERO_FRACTION = re.compile(r"\.0+(?=Z?$)")


def column_names(table: Path) -> list[str]:
    """The columns of a file.

    Raises:
        DataError: it is no Parquet file.
    """
    try:
        names: list[str] = pyarrow.parquet.read_schema(table).names
        return names
    except pyarrow.ArrowException as error:
        raise DataError(f"{table} is not a Parquet file: {error}") from error


def read_batches(table: Path, columns: Sequence[str], encoding: str) -> Iterator[dict[str, list[str | None]]]:
    """Column -> texts, for some rows at a time; None is null or NaN.

    Numbers and booleans are written as JSON writes them (12.0, true), dates as in ISO 8601, binary columns
    are decoded by `encoding`, its bad bytes as lone surrogates.

    Raises:
        DataError: the file is damaged, or a column's type has no text.
    """
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                yield {name: _texts(table, name, batch.column(name), encoding) for name in columns}
    except pyarrow.ArrowException as error:
        raise DataError(f"{table} is not a Parquet file, or damaged: {error}") from error


def _texts(table: Path, name: str, values: pyarrow.Array, encoding: str) -> list[str | None]:
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if _is_binary(kind):
        return [None if v is None else v.decode(encoding, "surrogateescape") for v in values.to_pylist()]
    if pyarrow.types.is_floating(kind):
        return _numbers(table, name, values)
    if pyarrow.types.is_nested(kind):
        raise DataError(f"{table}: column {name!r} holds more than one value a row ({kind})")
    try:
        texts: list[str | None] = values.cast(pyarrow.string()).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{table}: column {name!r} is of a type without text ({kind})") from error
    if pyarrow.types.is_temporal(kind):
        return [None if text is None else _ZERO_FRACTION.sub("", text) for text in texts]
    return texts


def _is_binary(kind: pyarrow.DataType) -> bool:
    tests = (
        pyarrow.types.is_binary,
        pyarrow.types.is_large_binary,
        pyarrow.types.is_fixed_size_binary,
        pyarrow.types.is_binary_view,
    )
    return any(test(kind) for test in tests)


def _numbers(table: Path, name: str, values: pyarrow.Array) -> list[str | None]:
    """The shortest text of each number in its own precision, with ".0" where it is whole."""
    # From here on whole numbers have gaps: two ids may have become one.
    exact = {16: 2**11, 32: 2**24, 64: 2**53}[values.type.bit_width]
    texts: list[str | None] = []
    for number, short in zip(values.to_pylist(), values.cast(pyarrow.string()).to_pylist(), strict=True):
        if number is None or math.isnan(number):
            texts.append(None)
            continue
        if exact <= abs(number) < math.inf:
            raise DataError(
                f"{table}: column {name!r} holds numbers that {values.type} cannot tell apart; store it as "
                "text or as integers"
            )
        texts.append(repr(float(short)))
    return texts

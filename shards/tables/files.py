"""Opens a table's file: which kind its name says, plain or gzip, and the encoding its first bytes allow."""

import codecs
import gzip
import io
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO, Literal, Protocol, TextIO, cast

from shards.errors import DataError

#: Longest line, and longest record over several lines, in characters: what is longer is no row of a table.
MAX_RECORD = 1 << 24

_GZIP = ".gz"
_GZIP_MAGIC = b"\x1f\x8b"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)
_HEAD_BYTES = 4096


class TableFile(Protocol):
    """What a table is read from: a path, or something else with a name that can be opened (in a zip)."""

    @property
    def name(self) -> str:
        """File name, whose ending tells the kind of the table."""

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Its bytes from the start; they can be sought in."""


def table_kind(table: TableFile) -> str:
    """Lower-case ending of a table's name without ".gz": ".csv", ".jsonl", ..."""
    name = table.name.lower().removesuffix(_GZIP)
    return PurePath(name).suffix


def locate(table: Path) -> Path:
    """`table`, or where it does not exist the same name with or without ".gz"."""
    if table.exists():
        return table
    is_compressed = table.name.lower().endswith(_GZIP)
    other = table.with_name(table.name[: -len(_GZIP)] if is_compressed else table.name + _GZIP)
    return other if other.exists() else table


def check_encoding(encoding: str) -> str:
    """The codec's own name of an encoding.

    Raises:
        ValueError: there is no such encoding of text.
    """
    try:
        "".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:
        raise ValueError(f"{encoding!r} is no encoding of text") from error


@contextmanager
def open_bytes(table: TableFile) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed where its name ends in ".gz".

    Raises:
        DataError: it cannot be read, is no regular file, or is not what its name says.
    """
    try:
        if isinstance(table, Path) and not stat.S_ISREG(table.stat().st_mode):
            raise DataError(f"{table} is not a regular file; a table is read more than once")
        with table.open("rb") as file:
            magic = file.read(len(_GZIP_MAGIC))
            file.seek(0)
            if table.name.lower().endswith(_GZIP):
                with gzip.open(file) as content:
                    yield cast(BinaryIO, content)
            elif magic == _GZIP_MAGIC:
                raise DataError(f"{table} is compressed by gzip; let its name end in {table_kind(table)}.gz")
            else:
                yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{table} is not a complete gzip file: {error}") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{table} is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {table}: {error.strerror or error}") from error


@contextmanager
def open_text(table: TableFile, encoding: str) -> Iterator[TextIO]:
    """Open a table's text, line ends as they are, without its byte order mark.

    Bytes that are no text in `encoding` become lone surrogates, so that one bad row can be told from the
    good ones.

    Raises:
        DataError: as `open_bytes`; or the file's first bytes contradict `encoding`.
    """
    with open_bytes(table) as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        codec = _codec(table, head, check_encoding(encoding))
        with io.TextIOWrapper(file, encoding=codec, errors="surrogateescape", newline="") as text:
            try:
                yield text
            except UnicodeError as error:
                raise DataError(f"{table} is not {encoding} text; set `encoding`") from error


def _codec(table: TableFile, head: bytes, encoding: str) -> str:
    """The codec that reads a file of this head; it skips the byte order mark."""
    family = next((name for name in ("utf-8", "utf-16", "utf-32") if encoding.startswith(name)), encoding)
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if marked is None:
        # Text of a one-byte encoding holds no NUL; in UTF-16 every second byte of plain English is one.
        if head.count(0) > len(head) // 4 and family not in ("utf-16", "utf-32"):
            raise DataError(f"{table} looks like UTF-16; set `encoding: utf-16-le` (or utf-16-be)")
        return encoding
    if marked != family:
        raise DataError(
            f"{table} begins with the byte order mark of {marked.upper()}, but is read as {encoding}; "
            f"set `encoding: {marked}`"
        )
    return "utf-8-sig" if marked == "utf-8" else marked

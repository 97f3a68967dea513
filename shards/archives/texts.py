"""Tables, lists and JSON files of an archive, with the quirks that published ones have.

Text is UTF-8, with or without a byte order mark; a file that is not is read as Latin-1, and that is said.
Names in a header are stripped; where a bracket holds commas ("Bbox [x,y,w,h]"), each of its cells gets a name
of its own ("Bbox [x]", "Bbox [y]", ...). Empty cells, "nan" and "None" are missing.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import xxhash

from shards.archives.files import ArchiveFiles, Member
from shards.archives.records import Record
from shards.errors import DataError, nearest
from shards.strict_json import JsonError, parse_json
from shards.tables.delimited import Record as Header
from shards.tables.delimited import read_records
from shards.tables.files import open_bytes, open_text, table_kind
from shards.tables.reading import TableFormat, read_rows
from shards.tables.rows import BadRow

MISSING = ("nan", "none")
_FALLBACK = "latin-1"
_JSON_LIMIT = 1 << 30
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Named:
    """A file under another name, which tells the kind of table it is."""

    member: Member
    name: str

    def __str__(self) -> str:
        return str(self.member)

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        return self.member.open(mode)


@dataclass(frozen=True)
class Table:
    """Rows of a table in order, as often as they are asked for.

    Attributes:
        name: of its file, without folders; for messages.
        columns: that its records hold.
        absent: optional columns that the file lacks; its records hold "" there.
    """

    name: str
    columns: tuple[str, ...]
    absent: tuple[str, ...]
    file: _Named
    form: TableFormat
    origin: str

    def __iter__(self) -> Iterator[Record]:
        """Every row; a row that cannot be read is a `Record` whose `problem` says why."""
        empty = dict.fromkeys(self.absent, "")
        for row in read_rows(self.file, self.columns, self.form):
            if isinstance(row, BadRow):
                yield Record(self.name, row.line, {}, problem=row.reason)
            else:
                yield Record(self.name, row.line, row.cells | empty)

    def cells(self, column: str) -> Iterator[str]:
        """One column of every row.

        Raises:
            DataError: a row cannot be read, or has nothing there.
        """
        for record in self:
            if record.problem or not record[column]:
                problem = record.problem or f"column {column!r} is empty"
                raise DataError(f"{self.name}, line {record.line}: {problem}; {self.again()}")
            yield record[column]

    def again(self) -> str:
        """What to do about a damaged file."""
        return f"get the file again from {self.origin}"


class ArchiveTexts:
    """Text files of an archive; remembers which were read, so that a build can tell whether they changed.

    Attributes:
        hashes: path of each file that was read, as it was asked for -> hash of its (unpacked) content.
        remarks: what the user should be told about them.
    """

    def __init__(self, files: ArchiveFiles) -> None:
        self.files = files
        self.hashes: dict[str, str] = {}
        self.remarks: list[str] = []

    def table(
        self,
        *names: str,
        columns: Sequence[str],
        optional: Sequence[str] = (),
        key: str | None = None,
        kind: str | None = None,
        delimiter: str | None = None,
    ) -> Table:
        """A table, the first of `names` that is there.

        Args:
            columns: that it must have, as `plain_header` names them.
            optional: that it may have.
            key: column whose cells have one form in all rows (`TableFormat.key`); default: the first of
                `columns`.
            kind: ".csv", ".tsv" or ".jsonl", where the ending of its name says something else.
            delimiter: where it is not the usual one of its kind.

        Raises:
            DataError: it is missing, cannot be read, or lacks a column.
        """
        member = self.files.get(*names)
        ending = ".gz" if member.name.lower().endswith(".gz") else ""
        file = _Named(member, f"table{kind}{ending}" if kind else member.name)
        form = TableFormat(
            encoding=self._inspect(file, names[0]),
            delimiter=delimiter,
            missing=MISSING,
            key=key or columns[0],
            name_columns=plain_header,
        )
        origin = self.files.origin
        present = self._header(file, form, columns) if optional or table_kind(file) != ".jsonl" else None
        absent = () if present is None else tuple(name for name in optional if name not in present)
        held = (*columns, *(name for name in optional if name not in absent))
        return Table(member.name, held, absent, file, form, origin)

    def lines(self, *names: str, ended: bool = False) -> Iterator[tuple[int, str]]:
        """Number (from 1) and text of each line that is not blank, without its end.

        Raises:
            DataError: it is missing, or its last line is `ended` by nothing: the file has been cut off.
        """
        file = _Named(member := self.files.get(*names), member.name)
        with open_text(file, self._inspect(file, names[0])) as text:
            for number, line in enumerate(text, start=1):
                if ended and not line.endswith(("\r", "\n")):
                    raise DataError(
                        f"{file}, line {number}: the file ends within a line; get it again from "
                        f"{self.files.origin}"
                    )
                if line.strip():
                    yield number, line.rstrip("\r\n")

    def json(self, *names: str) -> Any:
        """Value of a JSON file.

        Raises:
            DataError: it is missing, is no JSON, or names something twice.
        """
        file = _Named(member := self.files.get(*names), member.name)
        self._inspect(file, names[0])
        with open_bytes(file) as content:
            data = content.read(_JSON_LIMIT + 1).removeprefix(codecs.BOM_UTF8)
        try:
            return parse_json(data, _JSON_LIMIT)
        except JsonError as error:
            raise DataError(f"{file}: {error}; get the file again from {self.files.origin}") from error

    def _inspect(self, file: _Named, name: str) -> str:
        """Encoding of a file; its hash (by `name`) and what is to be said about it are remembered."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        digest, encoding = xxhash.xxh3_128(), "utf-8"
        with open_bytes(file) as content:
            while block := content.read(_BLOCK):
                digest.update(block)
                encoding = _next_encoding(decoder, block, encoding)
        if _next_encoding(decoder, b"", encoding, final=True) == _FALLBACK:
            encoding = _FALLBACK
            remark = f"{file.member.name} is not UTF-8; it was read as Latin-1"
            self.remarks += [] if remark in self.remarks else [remark]
        self.hashes[name] = f"xxh3:{digest.hexdigest()}"
        return encoding

    def _header(self, file: _Named, form: TableFormat, columns: Sequence[str]) -> list[str]:
        """Names in the header of a CSV or TSV file."""
        with open_text(file, form.encoding) as text:
            header = next(read_records(text, file, form.separator(table_kind(file)), None, plain_header))
        assert isinstance(header, Header), "the header comes first, or an error"
        for column in columns:
            if column not in header.cells:
                raise DataError(
                    f"{file}, line {header.line}: no column {column!r} in the header"
                    f"{nearest(column, header.cells)}; get the file again from {self.files.origin}"
                )
        return header.cells


def plain_header(cells: list[str]) -> list[str]:
    """Names of a header's cells: stripped, and each cell of a bracket that holds commas by itself.

    `["Bbox [x", "y]", " Pixels"]` -> `["Bbox [x]", "Bbox [y]", "Pixels"]`.
    """
    names, prefix = [], ""
    for cell in cells:
        name = cell.strip()
        if prefix:
            closed = name.endswith("]")
            names.append(f"{prefix}{name.removesuffix(']')}]")
            prefix = "" if closed else prefix
        elif "[" in name and "]" not in name:
            prefix = name[: name.index("[") + 1]
            names.append(f"{name}]")
        else:
            names.append(name)
    return names


def _next_encoding(decoder: Any, block: bytes, encoding: str, final: bool = False) -> str:
    if encoding == _FALLBACK:
        return encoding
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return _FALLBACK
    return encoding

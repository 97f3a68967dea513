"""Records of a CSV or TSV file (RFC 4180), with every quote checked.

A quote that is never closed makes its cell swallow the rows behind it. Where that shows, only the row in
which the quote stands is bad, and reading goes on in the line after it.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from shards.errors import DataError
from shards.tables.files import MAX_RECORD, TableFile
from shards.tables.rows import BadRow

NEVER_CLOSED = "a quote is opened and never closed"
TEXT_BEHIND = "text behind a closing quote"
SWALLOWED = (
    "a quoted cell holds a line that reads like another row (a quote too many? if the line belongs to the "
    "text, write the table as JSON lines)"
)

_LINE_ENDS = re.compile("\r\n|\r|\n")
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}$")
_MOST_FORMS = 256


@dataclass(frozen=True)
class Record:
    """Cells of a record and the line it begins in, from 1."""

    line: int
    cells: list[str]


def read_records(
    file: TextIO,
    table: TableFile,
    delimiter: str,
    key: str | None,
    name_columns: Callable[[list[str]], list[str]] | None = None,
) -> Iterator[Record | BadRow]:
    """The header as a `Record`, then every row.

    Args:
        table: for messages.
        key: column whose cells tell rows from lines of a text (an image path, an id); None: the first.
        name_columns: the header's cells as they stand -> as many names; None: they are the names.

    Raises:
        DataError: no header, or a line that is too long.
    """
    csv.field_size_limit(MAX_RECORD + 1)  # of the whole process; 131,072 by default
    lines = _Lines(file, table)
    header = _next_record(lines, delimiter)
    if header is None:
        raise DataError(f"{table} is empty")
    if isinstance(header, _Broken):
        raise DataError(f"{table}, line {header.line}: {header.reason}, in the header")
    names = name_columns(header.cells) if name_columns else header.cells
    yield Record(header.line, names)
    yield from _rows(lines, delimiter, names, key)


def _rows(lines: _Lines, delimiter: str, header: list[str], key: str | None) -> Iterator[Record | BadRow]:
    forms = _RowForms(len(header), header.index(key) if key in header else 0, delimiter)
    while (record := _next_record(lines, delimiter)) is not None:
        rest = record.taken[1:]
        if isinstance(record, _Broken):
            # A file that is cut off inside a report has no more rows; anything else might.
            if record.reason != NEVER_CLOSED or any(map(forms.could_be_row, rest)):
                lines.give_back(rest)
            yield BadRow(record.line, record.reason)
        elif rest and forms.swallowed(record.cells):
            lines.give_back(rest)
            yield BadRow(record.line, SWALLOWED)
        elif len(record.cells) != len(header):
            lines.give_back(rest if any(map(forms.could_be_row, rest)) else [])
            yield BadRow(record.line, f"row has {len(record.cells)} cells, the header {len(header)}")
        else:
            if record.line > lines.returned:  # what was in a cell may be prose with as many commas
                forms.learn(record.cells)
            yield Record(record.line, record.cells)


class _Lines:
    """Lines of a file with their ends; `number` is that of the last one.

    Lines can be given back; `returned` is the number of the last that was.
    """

    def __init__(self, file: TextIO, table: TableFile) -> None:
        self._file = file
        self._table = table
        self._again: deque[str] = deque()
        self.number = 0
        self.returned = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._file.readline(MAX_RECORD + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_RECORD:
            raise DataError(
                f"{self._table}, line {self.number}: longer than {MAX_RECORD:,} characters; is it a table?"
            )
        return line

    def give_back(self, lines: list[str]) -> None:
        """Read `lines`, the last that were read, once more."""
        self._again.extendleft(reversed(lines))
        self.returned = max(self.returned, self.number)
        self.number -= len(lines)


@dataclass(frozen=True)
class _Taken:
    """A record with the lines it was read from."""

    line: int
    taken: list[str]
    cells: list[str]


@dataclass(frozen=True)
class _Broken:
    line: int
    taken: list[str]
    reason: str


def _next_record(lines: _Lines, delimiter: str) -> _Taken | _Broken | None:
    """The next record that is no empty line; None at the end."""
    for first in lines:
        content = first.rstrip("\r\n")
        if not content:
            continue
        if '"' not in first:
            return _Taken(lines.number, [first], content.split(delimiter))
        return _quoted_record(first, lines, delimiter)
    return None


def _quoted_record(first: str, lines: _Lines, delimiter: str) -> _Taken | _Broken:
    """One record by the standard library's strict parser, which sees only the lines it asks for."""
    start, taken, at_end = lines.number, [first], False

    def feed() -> Iterator[str]:
        nonlocal at_end
        yield first
        size = len(first)
        for line in lines:
            taken.append(line)
            size += len(line)
            if size > MAX_RECORD:
                break
            yield line
        at_end = True

    try:
        cells = next(csv.reader(feed(), delimiter=delimiter, strict=True))
    except csv.Error:
        return _Broken(start, taken, NEVER_CLOSED if at_end else TEXT_BEHIND)
    return _Taken(start, taken, cells)


class _RowForms:
    """What the rows of this table look like, to find those that stand inside a quoted cell.

    A line reads like a row when the cell at the key's place has the form of earlier keys (a file name of the
    same ending, or the same run of letters, digits and signs), or when it has the right number of cells and,
    unlike prose, no space behind any separator. The latter needs a digit in that cell where all keys have
    one: "DOE,JOHN,MD" signs a report.
    """

    def __init__(self, width: int, key: int, delimiter: str) -> None:
        self._width = width
        self._key = key
        self._delimiter = delimiter
        self._forms: set[str] = set()
        self._have_digits = True

    def learn(self, cells: list[str]) -> None:
        """Remember the form of a good row's key."""
        self._have_digits &= _has_digit(cells[self._key])
        if len(self._forms) < _MOST_FORMS and cells[self._key].strip():
            self._forms.add(_form(cells[self._key]))

    def could_be_row(self, line: str) -> bool:
        """Whether a line has separators enough."""
        return line.count(self._delimiter) >= self._width - 1

    def swallowed(self, cells: list[str]) -> bool:
        """Whether a cell of this record holds (a part of) another row, or the rest of its own."""
        if self._key < len(cells):
            if _LINE_ENDS.search(cells[self._key]):
                return True
            own, have_digits = {_form(cells[self._key])}, self._have_digits and _has_digit(cells[self._key])
        else:
            own, have_digits = set(), False
        return any(
            self._holds_row(column, _LINE_ENDS.split(cell), self._forms | own, have_digits)
            for column, cell in enumerate(cells)
            if _LINE_ENDS.search(cell)
        )

    def _holds_row(self, column: int, lines: list[str], forms: set[str], have_digits: bool) -> bool:
        """Whether the lines of the cell in `column` hold a row; `have_digits`: all keys do.

        Its first line would be the rest of the record's own row, from `column` on; its last line the
        beginning of another, up to `column`.
        """
        first = lines[0].split(self._delimiter)
        if self._key > column and self._reads_like_row(
            first, self._key - column, self._width - column, forms
        ):
            return True
        for number, line in enumerate(lines[1:], 1):
            cells = line.split(self._delimiter)
            width = column + 1 if number == len(lines) - 1 else self._width
            if self._reads_like_row(cells, self._key, width, forms):
                return True
            tight = not any(cell[:1].isspace() for cell in cells[1:])
            if len(cells) == width > 2 and tight and self._could_be_key(cells, have_digits):
                return True
        return False

    def _reads_like_row(self, cells: list[str], key: int, width: int, forms: set[str]) -> bool:
        if not 0 <= key < len(cells) or len(cells) < 2:
            return False
        form = _form(cells[key])
        # Many words share the form of an id; few are file names.
        return form in forms and (form.startswith(".") or len(cells) == width)

    def _could_be_key(self, cells: list[str], with_digit: bool) -> bool:
        """Whether the cell at the key's place, if a line reaches that far, may be one."""
        if self._key >= len(cells):
            return True
        key = cells[self._key].strip()
        return not key or not (any(map(str.isspace, key)) or (with_digit and not _has_digit(key)))


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text))


def _form(key: str) -> str:
    """ ".jpg" for a file name, else the key with runs of letters as "a" and of digits as "0"."""
    key = key.strip()
    suffix = _SUFFIX.search(key)
    if suffix:
        return suffix[0].lower() + (" " if " " in key else "")
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", key))[:64]

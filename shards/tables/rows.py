"""Rows of a table: text by column, with the words that mean "missing" taken out."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

#: Cells that mean "no value", compared without regard to case; an empty cell always does.
MISSING_WORDS = ("nan", "-nan", "na", "n/a", "<na>", "#na", "#n/a", "none", "null", "nat")

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """A row that was read: `line` it begins in (Parquet: its number), both from 1; column -> text.

    A cell is stripped of white space at its ends, else as it was written; what is missing is "".
    """

    line: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read, and why; `line` as in `Row`. The reason holds none of its text."""

    line: int
    reason: str


class CellReader:
    """Turns the raw cells of a row into a `Row`, or says what is wrong with them.

    Args:
        encoding: encoding of the table, for messages.
        missing: words that mean "no value".
    """

    def __init__(self, encoding: str, missing: Collection[str] = MISSING_WORDS) -> None:
        self._encoding = encoding
        self._missing = frozenset(word.strip().casefold() for word in missing)
        self._longest = max(map(len, self._missing), default=0)

    def is_missing(self, text: str) -> bool:
        """Whether a cell of this text has no value."""
        text = text.strip()
        return not text or (len(text) <= self._longest and text.casefold() in self._missing)

    def row(self, line: int, raw: Mapping[str, str | None]) -> Row | BadRow:
        """A row of the given cells; None is missing."""
        cells = {}
        for column, text in raw.items():
            text = "" if text is None else text.strip()
            # Every bad byte and every half of a pair is a lone surrogate, which is not ASCII.
            if not text.isascii() and _SURROGATE.search(text):
                reason = f"column {column!r} is not {self._encoding} text (set `encoding` in the map)"
                return BadRow(line, reason)
            if "\0" in text:
                return BadRow(line, f"column {column!r} holds a NUL character")
            cells[column] = "" if self.is_missing(text) else text
        return Row(line, cells)

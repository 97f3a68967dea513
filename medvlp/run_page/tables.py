"""Tables of the page, and the cells they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and the number it is sorted by (None: as text)."""

    text: str
    value: float | None = None


@dataclass
class TableOf:
    """A table: caption, header, rows; `remarks` stand under it, `folded` is what hides it."""

    caption: str
    header: list[str]
    rows: list[list[Cell]]
    remarks: list[str] = field(default_factory=list)
    folded: str = ""

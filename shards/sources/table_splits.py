"""The split of the patients of a table, which not every row of a patient, or of his group, may name."""

from array import array

import numpy as np

from shards.errors import DataError
from shards.sources.table_groups import PatientGroups, digest_of, place_of
from shards.sources.table_map import TableMap
from shards.splits import normalise_split
from shards.tables.rows import Row

_EMPTY = -1


def stated_split(row: Row, column: str | None) -> str | None:
    """Split that a row names; None where the cell is empty or cannot be a name."""
    try:
        return normalise_split(row[column]) if column is not None and row[column] else None
    except ValueError:
        return None


class PatientSplits:
    """Which split is named for a patient or his group; takes in rows one by one, 28 bytes for each.

    Args:
        table_map: names the columns of patient, group and split.
        groups: of the patients, which has taken in the same rows.
    """

    def __init__(self, table_map: TableMap, groups: PatientGroups) -> None:
        self._patient, self._split = table_map.patient_id, table_map.split
        self._patient_groups = groups
        self._names: dict[str, int] = {}
        self._digests = bytearray()
        self._lines, self._codes = array("q"), array("i")
        self._units = np.empty(0, "V16")
        self._splits = np.empty(0, np.int32)
        self._divided = 0

    def see(self, row: Row) -> None:
        """Take in a row of the table."""
        if self._split is None or not row[self._patient]:
            return
        name = stated_split(row, self._split)
        if name is None and row[self._split]:
            return  # `load` rejects it
        self._digests += digest_of(row[self._patient])
        self._lines.append(row.line)
        self._codes.append(_EMPTY if name is None else self._names.setdefault(name, len(self._names)))

    def have_seen(self) -> None:
        """All rows have been taken in, by `groups` too.

        Raises:
            DataError: a row names no split, and others of its patient or group name two.
        """
        lines, codes = np.asarray(self._lines, np.int64), np.asarray(self._codes, np.int32)
        units = self._patient_groups.units(np.frombuffer(bytes(self._digests), "V16"))
        stated = codes != _EMPTY
        self._units, first, unit = np.unique(units[stated], return_index=True, return_inverse=True)
        self._splits = codes[stated][first]
        divided = self._units[np.unique(unit[codes[stated] != self._splits[unit]])]
        for i in np.flatnonzero(~stated & np.isin(units, divided))[:1]:
            named = np.flatnonzero(stated & (units == units[i]))
            other = named[codes[named] != codes[named[0]]][0]
            raise DataError(
                f"line {lines[i]} names no split, and lines {lines[named[0]]} and {lines[other]}, of the "
                f"same patient or group, name two; name the one that is meant in column {self._split!r}"
            )
        self._divided = self._patient_groups.count(divided)
        self._digests, self._lines, self._codes = bytearray(), array("q"), array("i")

    def split_of(self, patient: str) -> str | None:
        """Split of a patient, or of his group where he has one; None where no row names one."""
        unit = self._patient_groups.units(np.frombuffer(digest_of(patient), "V16"))
        place = place_of(unit.tobytes(), self._units)
        return None if place is None else list(self._names)[self._splits[place]]

    def remarks(self) -> list[str]:
        """Groups that the table divides."""
        divided = f"{self._divided:,} groups are in more than one split, as column {self._split!r} has it"
        return [divided] if self._divided else []

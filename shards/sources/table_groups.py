"""The group of a patient of a table, which not every row of the patient may name."""

import hashlib
from array import array

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.sources.table_map import TableMap
from shards.tables.rows import Row

#: Sixteen bytes each, as `digest_of` gives them.
Digests = NDArray[np.void]


class PatientGroups:
    """In which row the group of a patient stands; takes in rows one by one, 48 bytes for each with a group.

    Args:
        table_map: names the columns of patient and group.
    """

    def __init__(self, table_map: TableMap) -> None:
        self._patient, self._group = table_map.patient_id, table_map.group
        self._digests = bytearray()
        self._places = array("q")
        self._patients = np.empty(0, "V16")
        self._groups = np.empty(0, "V16")
        self._rows = np.empty(0, np.int64)

    def see(self, number: int, row: Row) -> None:
        """Take in row `number` of the table."""
        if self._group is not None and row[self._patient] and row[self._group]:
            # A group may be called like a patient: both are numbers in many tables.
            self._digests += digest_of(row[self._patient]) + digest_of(f"\0{row[self._group]}")
            self._places.extend((number, row.line))

    def have_seen(self) -> None:
        """All rows have been taken in.

        Raises:
            DataError: a patient is in two groups.
        """
        patients, groups = np.frombuffer(bytes(self._digests), "V16").reshape(-1, 2).T
        numbers, lines = np.asarray(self._places, np.int64).reshape(-1, 2).T
        self._patients, first, patient = np.unique(patients, return_index=True, return_inverse=True)
        self._groups, self._rows = groups[first], numbers[first]
        for i in np.flatnonzero(groups != groups[first[patient]])[:1]:
            raise DataError(
                f"lines {lines[first[patient[i]]]} and {lines[i]}: one patient is in two groups, but groups "
                f"are patients that must stay together; give all of them one in column {self._group!r}"
            )
        self._digests, self._places = bytearray(), array("q")

    def row_of(self, patient: str) -> int | None:
        """Number of a row that names the patient's group; None where no row does."""
        place = place_of(digest_of(patient), self._patients)
        return None if place is None else int(self._rows[place])

    def units(self, patients: Digests) -> Digests:
        """Digests of patients -> those of their groups, where they have one."""
        if not len(self._patients):
            return patients
        places = np.minimum(np.searchsorted(self._patients, patients), len(self._patients) - 1)
        return np.where(self._patients[places] == patients, self._groups[places], patients)

    def count(self, units: Digests) -> int:
        """How many of `units` are groups."""
        return int(np.isin(units, self._groups).sum())


def digest_of(text: str) -> bytes:
    """Stands for a text of any length in 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def place_of(digest: bytes, digests: Digests) -> int | None:
    """Where a digest stands in sorted ones; None where it does not."""
    sought = np.frombuffer(digest, "V16")
    place = int(np.searchsorted(digests, sought)[0])
    return place if place < len(digests) and digests[place] == sought[0] else None

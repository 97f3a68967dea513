"""Rows of a table that the user's files of ids leave out (`--exclude`)."""

from collections.abc import Iterator

from shards.archives.id_lists import UserLists
from shards.errors import DataError
from shards.sources.table_map import TableMap
from shards.tables.rows import BadRow, Row


class LeftOut:
    """Leaves out the rows whose patient, study, id or image the files name.

    Args:
        table_map: of the table. lists: of the user.
    """

    def __init__(self, table_map: TableMap, lists: UserLists) -> None:
        names = (table_map.patient_id, table_map.study_id, table_map.id, table_map.image)
        self._columns = [name for name in names if name is not None]
        self._patient = table_map.patient_id
        self._lists = lists
        self._count = 0
        # Ids that left out a patient, and those that left out a row of a patient who is not named.
        self._patients: set[str] = set()
        self._others: set[str] = set()

    def pass_on(self, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
        """The rows that stay, and those that cannot be read."""
        for row in rows:
            if isinstance(row, Row) and self._lists.excludes(*(row[name] for name in self._columns)):
                self._count += 1
                self._see(row)
            else:
                yield row

    def remarks(self) -> list[str]:
        """What was left out.

        Raises:
            DataError: none of a file's ids is in the table, or an id is that of a patient and, in a row of
                another one, of something else.
        """
        if both := len(self._patients & self._others):
            raise DataError(
                f"{both:,} ids of --exclude are those of patients, and in rows of other patients of studies, "
                "rows or images: name the images that are meant, or give patients ids of their own"
            )
        lines = [f"{self._count:,} rows left out by --exclude"] if self._count else []
        return lines + self._lists.check()

    def _see(self, row: Row) -> None:
        if self._lists.excludes(row[self._patient]):
            self._patients.add(row[self._patient])
        else:
            self._others |= {row[name] for name in self._columns if self._lists.excludes(row[name])}

"""Lists of ids: an archive's own splits, and what users give (`--split-list`, `--exclude`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from shards.archives.records import temporary_database
from shards.errors import DataError, UsageError
from shards.format import hash_file
from shards.metadata import LIST_NAME
from shards.splits import SPLITS, normalise_split
from shards.tables.delimited import Record as CsvRecord
from shards.tables.delimited import read_records
from shards.tables.files import open_text
from shards.tables.rows import BadRow


class IdLists:
    """Which lists an id stands in; the ids lie in a temporary SQLite file.

    Args:
        normalise: an id as a list writes it -> the one form in which ids are compared.
    """

    def __init__(self, normalise: Callable[[str], str] = str.strip) -> None:
        self._database = temporary_database()
        self._database.execute(
            "CREATE TABLE ids (id TEXT, list INTEGER, used INTEGER, PRIMARY KEY (id, list)) WITHOUT ROWID"
        )
        self._normalise = normalise
        self._lists: list[tuple[str, str]] = []

    @property
    def names(self) -> list[str]:
        """Names of the lists, in the order in which they were added."""
        return list(dict.fromkeys(name for name, _ in self._lists))

    def add(self, name: str, ids: Iterable[str], file: str) -> None:
        """Take in a list.

        Raises:
            DataError: it holds no ids; `file` is what the message calls it.
        """
        wanted = {self._normalise(text) for text in ids if text.strip()}
        if not wanted:
            raise DataError(f"{file} holds no ids; it should have one a line")
        rows = ((text, len(self._lists)) for text in sorted(wanted))
        self._database.executemany("INSERT INTO ids VALUES (?, ?, 0)", rows)
        self._lists.append((name, file))

    def of(self, *ids: str) -> list[str]:
        """Names of the lists that hold any of these ids."""
        wanted = tuple(dict.fromkeys(self._normalise(text) for text in ids if text))
        query = f"SELECT id, list FROM ids WHERE id IN ({','.join('?' * len(wanted))})"
        found = self._database.execute(query, wanted).fetchall()
        self._database.executemany("UPDATE ids SET used = 1 WHERE id = ? AND list = ? AND used = 0", found)
        held = {self._lists[number][0] for _, number in found}
        return [name for name in self.names if name in held]

    def one_of(self, names: Iterable[str], *ids: str) -> str | None:
        """The one of the lists `names` that holds any of these ids, or None.

        Raises:
            DataError: several do.
        """
        wanted = set(names)
        held = [name for name in self.of(*ids) if name in wanted]
        if len(held) > 1:
            files = [file for name, file in self._lists if name in held]
            raise DataError(
                f"an id stands in both {files[0]} and {files[1]}; a record can be in one split only"
            )
        return held[0] if held else None

    def unused(self) -> Iterator[tuple[str, int, int]]:
        """File, ids, ids that no record has, of each list."""
        query = "SELECT list, count(*), count(*) - sum(used) FROM ids GROUP BY list ORDER BY list"
        for number, count, unused in self._database.execute(query):
            yield self._lists[number][1], count, unused


class UserLists:
    """The lists on the command line.

    A list named train, valid or test (or another word for one of these) gives a split: the records in none of
    these lists are left out, because nobody said where they belong. Any other list is a named part.

    Args:
        named: "NAME=FILE", each file one id a line, or a CSV file with a column "ID".
        excluded: files of ids to leave out.
        normalise: as in `IdLists`.

    Raises:
        UsageError: not of that form, or a name twice.
        DataError: a file cannot be read or is empty.
    """

    def __init__(
        self, named: Sequence[str], excluded: Sequence[Path], normalise: Callable[[str], str]
    ) -> None:
        self._lists, self._excluded = IdLists(normalise), IdLists(normalise)
        #: What a build records of them: name or "exclude" -> hashes of the files.
        self.hashes: dict[str, list[str]] = {}
        for text in named:
            name, file = _parse(text)
            if name in self._lists.names:
                raise UsageError(f"--split-list {text!r}: {name!r} is there twice")
            self._lists.add(name, _ids(file), str(file))
            self.hashes[name] = [hash_file(file)]
        for file in excluded:
            self._excluded.add("exclude", _ids(file), str(file))
            self.hashes.setdefault("exclude", []).append(hash_file(file))
        self._splits = [name for name in self._lists.names if name in SPLITS]

    def excludes(self, *ids: str) -> bool:
        """Whether a record of these ids is to be left out."""
        return bool(self._excluded.names) and bool(self._excluded.of(*ids))

    def place(self, *ids: str) -> tuple[str | None, list[str]]:
        """Split by the lists (None: they give none), and the named parts of a record of these ids."""
        if not self._lists.names:
            return None, []
        split = self._lists.one_of(self._splits, *ids) if self._splits else None
        return split, [name for name in self._lists.of(*ids) if name not in SPLITS]

    @property
    def give_splits(self) -> bool:
        """Whether they replace the splits of the archive."""
        return bool(self._splits)

    def check(self) -> list[str]:
        """A line for each list of which some ids are not in the data.

        Raises:
            DataError: none of a list's ids is: they are written in another way, or belong to another archive.
        """
        lines = []
        for lists in (self._lists, self._excluded):
            for file, count, unused in lists.unused():
                if unused == count:
                    raise DataError(
                        f"none of the {count:,} ids in {file} is in the data; is it a list of its ids?"
                    )
                if unused:
                    lines.append(f"{unused:,} of {count:,} ids in {Path(file).name} are not in the data")
        return lines


def _ids(file: Path) -> Iterator[str]:
    """Ids of a list: one a line, or the column "ID" of a CSV file (as LoVT and MedKLIP publish theirs)."""
    if file.suffix.lower() == ".csv":
        with open_text(file, "utf-8") as text:
            rows = read_records(text, file, ",", None)
            header = next(rows)
            assert isinstance(header, CsvRecord), "the header comes first, or an error"
            names = [cell.strip().lower() for cell in header.cells]
            if "id" in names:
                yield from _column(file, rows, names.index("id"))
                return
    with open_text(file, "utf-8") as text:
        for number, line in enumerate(text, start=1):
            if not line.isascii() and any("\ud800" <= sign <= "\udfff" for sign in line):
                raise DataError(f"{file}, line {number}: not UTF-8 text")
            yield line


def _column(file: Path, rows: Iterable[CsvRecord | BadRow], place: int) -> Iterator[str]:
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(f"{file}, line {row.line}: {row.reason}")
        yield row.cells[place]


def _parse(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not file or not LIST_NAME.fullmatch(name):
        raise UsageError(f"--split-list {text!r}: write it as NAME=FILE, for example train_1=train_1.txt")
    try:
        split = normalise_split(name)
    except ValueError:  # it has signs that no split has
        split = name
    return (split if split in SPLITS else name), Path(file)

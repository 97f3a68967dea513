"""The base of all importers of archives: options, counts, splits and lists, exclusion, licence."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from shards.archives.files import ArchiveFiles
from shards.archives.id_lists import UserLists
from shards.archives.records import Join, Record, temporary_database
from shards.archives.texts import ArchiveTexts
from shards.errors import DataError, UsageError
from shards.images import decode_image
from shards.sources.base import Json, PublishedCount, RejectedRecord, Source, option
from shards.splits import SPLITS, split_of
from shards.study import Study
from shards.tables.rows import BadRow, Row
from shards.tables.store import RowStore
from shards.text.sentences import split_sentences

#: Endings that lists of ids write or leave out.
_ID_ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".txt")
_VALID_SEED = "medvlp valid"


@dataclass(frozen=True, kw_only=True)
class ArchiveOptions:
    """Options that every archive has; those of an importer are a subclass."""

    root: Path = option("folder of the archive, unpacked or with its zips in it, or its zip")
    limit: int | None = option("only the first records, for a first look", None, least=1)
    strict: bool = option("fail where the records are not as many as published", False)
    split_list: list[str] = option(
        "NAME=FILE, one id a line (repeatable): train, valid and test replace the archive's splits; others "
        "become named parts",
        [],
    )
    exclude: list[Path] = option("file of patient, study or image ids to leave out (repeatable)", [])
    valid_share: float = option(
        "share of the archive's train patients that become valid, where it names no valid",
        0.0,
        least=0,
        most=0.5,
    )


@dataclass(frozen=True)
class Facts:
    """What is known of an archive.

    Attributes:
        title: its name, for messages.
        license: licence of its samples; `access`: who gets them ("free", "credentialed", ...).
        origin: where to get it: an address, with a word on how where that is not plain.
        unit: what a record is, in the plural.
    """

    title: str
    license: str
    access: str
    origin: str
    unit: str = "images"


@dataclass(frozen=True)
class Identity:
    """Whose a record is and what it is called.

    Attributes:
        patient: decides the split.
        image: unique among the records; also the id that lists name.
        study: id of its study.
        split: that the archive prescribes, or None.
        published_split: in which the publication counts it, where `split` is another: that of a test on the
            patient, and no list of a user's brings such a record back into train or valid.
        left_out: why the record is not asked for ("neither PA nor AP"), or "". It is then counted and told,
            not rejected.
    """

    patient: str
    image: str
    study: str
    split: str | None = None
    published_split: str | None = None
    left_out: str = ""


class ArchiveSource(Source):
    """Records of an archive. An importer sets `name`, `facts` and `label_names`, and writes three methods.

    The tables are read once, when the source is made; what a record needs is kept in a temporary file, so
    memory does not grow with them. `load` reads images (and reports that lie in files of their own).

    Attributes:
        published: "all" or a split, or whatever `found` counts -> the published number; compared at the end.
        found: the same, counted. The base counts "all" and the splits that the archive prescribes.
        notes: what `studies` did to images, for whom the build tells -> how often.
        language: of its reports, as `shards.text.headings` names it.
        reading: raised when the same files give other samples, so that an old build is not gone on with.
    """

    facts: ClassVar[Facts]
    language: str = "en"
    reading: ClassVar[int] = 1

    def __init__(self, options: ArchiveOptions) -> None:
        self.options = options
        self.published: dict[str, int] = {}
        self.found: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._texts: list[ArchiveTexts] = []
        self._joins: list[Join] = []
        self.texts = self.open(options.root)
        self.files = self.texts.files
        self.prepare()
        lists = UserLists(options.split_list, options.exclude, self.list_id)
        survey = _Survey(self, lists)
        self._rows = RowStore(survey.rows(), _COLUMNS)
        self._remarks = survey.remarks()
        self._remarks += [remark for texts in self._texts for remark in texts.remarks]
        self._remarks += [
            f"{name}: {count:,} rows are about no record of the archive"
            for join in self._joins
            for name, count in join.unused().items()
        ]
        self.arguments = self._arguments(lists)
        self._texts, self._joins = [], []
        self._check()

    # What an importer writes.

    def prepare(self) -> None:
        """Read what is needed before the records; set `published`, and what options decide."""

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Every record in a fixed order, bad rows included."""

    @abstractmethod
    def identify(self, record: Record) -> Identity:
        """Whose it is.

        Raises:
            RejectedRecord: it cannot be known.
        """

    @abstractmethod
    def studies(self, record: Record) -> list[Study]:
        """The record's images with what is known of them; split, lists, licence and sentences come from here.

        Raises:
            RejectedRecord: it cannot be used.
        """

    def parts(self, record: Record) -> list[str]:
        """Names of the archive's own lists and fractions that the record stands in."""
        return []

    def list_id(self, text: str) -> str:
        """An id as a list (or `Identity`) writes it -> one form: no folders, no ending of an image file."""
        name = text.strip().replace("\\", "/").rpartition("/")[2]
        ending = next((ending for ending in _ID_ENDINGS if name.lower().endswith(ending)), "")
        return name.removesuffix(name[len(name) - len(ending) :]) if ending else name

    # What an importer uses.

    def open(self, root: Path, origin: str | None = None, *, deep: bool = True) -> ArchiveTexts:
        """Files of another folder or zip that belongs to the archive; `deep` as `ArchiveFiles` has it."""
        texts = ArchiveTexts(ArchiveFiles(root, origin or self.facts.origin, deep=deep))
        self._texts.append(texts)
        return texts

    def join(self) -> Join:
        """Tables by key; rows that belong to no record are counted and told at the end."""
        self._joins.append(Join())
        return self._joins[-1]

    def image(self, *paths: str, placed: bool = False) -> NDArray[np.uint8]:
        """Pixels of an image of the archive, uint8 [height, width]; the first of `paths` that is there.

        Args:
            placed: boxes or masks are drawn in it.

        Raises:
            DataError: it is missing or broken, or `placed` and turned by its file.
        """
        path = next((path for path in paths[:-1] if self.files.find(path) is not None), paths[-1])
        return decode_image(self.files.read(path), placed=placed)

    # What a build asks for.

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, i: int) -> list[Study]:
        """The images of record `i`.

        Raises:
            RejectedRecord: the record cannot be used.
        """
        row = self._rows[i]
        if isinstance(row, BadRow):
            raise RejectedRecord(row.reason, i, row.line)
        record = Record.from_json(row["record"])
        try:
            studies = self.studies(record)
        except RejectedRecord as error:
            raise RejectedRecord(error.reason, i, error.line or row.line) from error
        except DataError as error:
            raise RejectedRecord(str(error), i, row.line) from error
        return [self._completed(study, row) for study in studies]

    def split_key(self, i: int) -> str:
        """Patient of record `i`; a record that `load` rejects stands alone."""
        row = self._rows.read(i, ["patient"])
        return f"row {i}" if isinstance(row, BadRow) else row["patient"]

    def prescribed_split(self, i: int) -> str | None:
        """Split by the given lists, else the archive's own."""
        row = self._rows.read(i, ["split"])
        return None if isinstance(row, BadRow) else row["split"] or None

    def lists(self, i: int) -> list[str]:
        """Named lists and fractions that record `i` stands in, the archive's own first."""
        row = self._rows.read(i, ["lists"])
        names: list[str] = [] if isinstance(row, BadRow) else json.loads(row["lists"])
        return names

    def remarks(self) -> list[str]:
        """Lines about the archive as a whole."""
        return self._remarks

    def take_notes(self) -> dict[str, int]:
        """What was noted since the last call."""
        notes, self.notes = self.notes, Counter()
        return dict(notes)

    def published_counts(self) -> list[PublishedCount]:
        """The published numbers beside those found."""
        return [
            PublishedCount(self._count_name(name), count, self.found[name])
            for name, count in self.published.items()
        ]

    def _count_name(self, name: str) -> str:
        return f"{name} {self.facts.unit}" if name == "all" or name in SPLITS else name

    def _completed(self, study: Study, row: Row) -> Study:
        sentences = study.sentences or [
            sentence for text in study.sections.values() for sentence in split_sentences(text)
        ]
        return replace(
            study,
            sentences=sentences,
            split=row["split"] or None,
            source=study.source or self.name,
            license=study.license or self.facts.license,
            lists=json.loads(row["lists"]),
            extra=study.extra | {"access": self.facts.access},
        )

    def _arguments(self, lists: UserLists) -> dict[str, Json]:
        shown = {
            name: value is not None if isinstance(value, Path) else value
            for name, value in vars(self.options).items()
            if name not in ("root", "strict", "split_list", "exclude")
        }
        files: dict[str, str] = {}
        for name, digest in (pair for texts in self._texts for pair in texts.hashes.items()):
            files[name] = f"{files[name]} {digest}" if name in files else digest  # of two roots
        return {
            "options": shown,
            "files": files,
            "lists": lists.hashes,
            "language": self.language,
            "reading": self.reading,
        }

    def _check(self) -> None:
        """Fail where nothing is left, and with --strict where the numbers are not the published ones."""
        wrong = [count for count in self.published_counts() if count.published != count.found]
        if wrong and self.options.strict:
            parts = "; ".join(f"{c.name}: {c.found:,} found, {c.published:,} published" for c in wrong)
            raise DataError(f"{self.facts.title}: {parts} (--strict); is the archive complete?")
        if not len(self):
            raise DataError(f"{self.options.root} holds no records of {self.facts.title} that are asked for")


_COLUMNS = ("record", "patient", "split", "lists")


class _Survey:
    """Goes through all records once: who is left out, which split and lists each has, how many there are."""

    def __init__(self, source: ArchiveSource, lists: UserLists) -> None:
        self._source = source
        self._lists = lists
        self._left_out: Counter[str] = Counter()
        self._kept_out: Counter[str] = Counter()
        self._splits: Counter[str] = Counter()
        self._seen = temporary_database()
        self._seen.execute("CREATE TABLE images (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def rows(self) -> Iterator[Row | BadRow]:
        """What is kept of each record, bad ones included."""
        kept = 0
        for record in self._source.records():
            row = self._row(record)
            # Beyond the limit records are still counted.
            if row is not None and (self._source.options.limit is None or kept < self._source.options.limit):
                kept += 1
                yield row

    def remarks(self) -> list[str]:
        """What was left out, and what the lists name in vain."""
        self._check_valid_share()
        lines = [f"{count:,} records left out: {why}" for why, count in sorted(self._left_out.items())]
        lines += [
            f"{count:,} records that --split-list has in train or valid stay in {split!r}, which is tested on"
            for split, count in sorted(self._kept_out.items())
        ]
        return lines + self._lists.check()

    def _row(self, record: Record) -> Row | BadRow | None:
        if record.problem:
            return BadRow(record.line, f"{record.file}: {record.problem}")
        try:
            identity = self._source.identify(record)
            if not identity.patient:
                raise record.error("no patient")
            if not self._seen.execute("INSERT OR IGNORE INTO images VALUES (?)", (identity.image,)).rowcount:
                raise record.error("an earlier row is about the same image")
        except RejectedRecord as error:
            return BadRow(error.line or record.line, error.reason)
        counted = identity.published_split or identity.split
        self._source.found.update(["all", *([counted] if counted else [])])
        ids = (identity.image, identity.study, identity.patient)
        excluded = self._lists.excludes(*ids)  # asked in any case, so that every id of a list is seen
        split, parts = self._lists.place(*ids)
        outside = "in no list of train, valid and test" if self._lists.give_splits and split is None else ""
        if left_out := "--exclude" if excluded else identity.left_out or outside:
            self._left_out[left_out] += 1
            return None
        cells = {
            "record": record.to_json(),
            "patient": identity.patient,
            "split": self._split(identity, split),
            "lists": json.dumps(list(dict.fromkeys([*self._source.parts(record), *parts]))),
        }
        return Row(record.line, cells)

    def _split(self, identity: Identity, listed: str | None) -> str:
        """The split by the user's lists, else the archive's own; "" where neither names one."""
        own, share = identity.split, self._source.options.valid_share
        if listed in ("train", "valid") and own and identity.published_split not in (None, own):
            self._kept_out[own] += 1
            return own
        split = listed or own or ""
        self._splits[split] += 1
        if split == "train" and share:
            return split_of(identity.patient, {"valid": share, "train": 1 - share}, _VALID_SEED)
        return split

    def _check_valid_share(self) -> None:
        """Refuse a share of train patients where it would do nothing, or mix them into a valid split."""
        if not self._source.options.valid_share:
            return
        if self._lists.give_splits:
            raise UsageError("--valid-share: --split-list names the splits; name valid there too")
        if not self._splits["train"]:
            raise UsageError(
                "--valid-share is of an archive's own train, and this one names none: its patients are "
                "divided by --split (train=0.8,valid=0.1,test=0.1)"
            )
        if self._splits["valid"]:
            raise UsageError(
                f"--valid-share: {self._splits['valid']:,} records are valid by the archive's own split, "
                "with which train patients would be mixed; leave it out"
            )

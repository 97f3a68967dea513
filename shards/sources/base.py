"""What a source of studies must offer so that building can be divided over processes and nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

from shards.errors import DataError
from shards.study import Study

#: Values that can stand in `index.json`.
Json = Any


class RejectedRecord(DataError):  # noqa: N818 - a record is rejected, the build goes on
    """A record that cannot become a sample; counted and listed in `rejected.jsonl`.

    Args:
        reason: what is wrong. Never holds report text or patient ids.
        record: number of the record in its source; filled in by the build when left out.
        line: line of the source's file in which the record begins, from 1, where it has one.
    """

    def __init__(self, reason: str, record: int | None = None, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.record = record
        self.line = line


def option(
    help: str,
    default: Any = MISSING,
    *,
    name: str | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A field of a source's options, and an option of `medvlp shards build NAME`.

    Args:
        help: what it means, in a few words.
        default: its value when it is not given; without one the option is required.
        name: of the option, such as "--map"; default: that of the field.
        least, most: inclusive range of a number.
    """
    metadata = {"help": help, "name": name, "least": least, "most": most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class PublishedCount:
    """A number that a source's publication names, beside the one that was found."""

    name: str
    published: int
    found: int


class Source(ABC):
    """Numbered records, each giving the images of one study.

    A source is cheap to construct and can be pickled, because every building process gets its own copy.
    Record `i` must give the same studies in every process and on every run.

    Attributes:
        name: of the kind of source, as in `medvlp shards build NAME`.
        label_names: the findings whose labels a sample may have, in the order of the index.
        arguments: everything beside the records themselves that the bytes of the dataset depend on, as the
            index records it: no path, no secret.
        identifying: fields of `Study.extra` that tell the patient or study; left out where ids are hashed.
        generated: whether its reports are made up by a program, so that no word in them is anybody's.
    """

    name: ClassVar[str]
    generated: ClassVar[bool] = False
    identifying: Collection[str] = ()
    label_names: list[str]
    arguments: dict[str, Json]

    @property
    def title(self) -> str:
        """What the dataset is called unless the user names it."""
        return self.name

    @abstractmethod
    def __len__(self) -> int:
        """Number of records, rejected ones included."""

    @abstractmethod
    def load(self, i: int) -> list[Study]:
        """All images of record `i`, pixels decoded.

        Raises:
            RejectedRecord: the record cannot be used.
        """

    @abstractmethod
    def split_key(self, i: int) -> str:
        """Patient (or larger group) of record `i`, without decoding its image; decides the split."""

    def prescribed_split(self, i: int) -> str | None:
        """Split the source prescribes for record `i`, or None to hash `split_key`."""
        return None

    def remarks(self) -> list[str]:
        """Lines about the source as a whole that its user should see at the end of the build."""
        return []

    def published_counts(self) -> list[PublishedCount]:
        """Numbers that are published of the source, beside those found; shown at the end of the build."""
        return []

    def take_notes(self) -> dict[str, int]:
        """What `load` did that its user should know -> how often, since the last call in this process."""
        return {}

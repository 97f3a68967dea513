"""What a source of studies must offer so that building can be divided over processes and nodes."""

from __future__ import annotations

from typing import Any, Protocol

from shards.errors import DataError
from shards.study import Study

#: Values that can stand in `index.json`.
Json = Any


class RejectedRecord(DataError):  # noqa: N818 - a record is rejected, the build goes on
    """A record that cannot become a sample; counted and listed in `rejected.jsonl`.

    Args:
        reason: what is wrong. Never holds report text or patient ids.
        record: number of the record in its source; filled in by the build when left out.
    """

    def __init__(self, reason: str, record: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.record = record


class Source(Protocol):
    """Numbered records, each giving the images of one study.

    A source is cheap to construct and can be pickled, because every building process gets its own copy.
    Record `i` must give the same studies in every process and on every run.
    """

    name: str
    label_names: list[str]
    arguments: dict[str, Json]

    def __len__(self) -> int:
        """Number of records, rejected ones included."""
        ...

    def load(self, i: int) -> list[Study]:
        """All images of record `i`, pixels decoded.

        Raises:
            RejectedRecord: the record cannot be used.
        """
        ...

    def split_key(self, i: int) -> str:
        """Patient (or larger group) of record `i`, without decoding its image; decides the split."""
        ...

    def prescribed_split(self, i: int) -> str | None:
        """Split the source prescribes for record `i`, or None to hash `split_key`."""
        return None

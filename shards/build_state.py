"""What a build remembers on disk while it runs: its plan and, for every finished shard, what it holds."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from shards.atomic import atomic_write
from shards.errors import DataError
from shards.format import FORMAT_VERSION, INDEX_LIMIT, INDEX_NAME, REJECTED_NAME, Index, Shard, hash_file
from shards.plan import PlannedShard
from shards.sources.base import Json, PublishedCount
from shards.strict_json import JsonError, parse_json, read_limited, to_record

#: Folder inside the dataset, removed when the index is written.
STATE_FOLDER = ".build"
_PLAN_NAME = "plan.json"
#: Of the list of rejected records, in bytes.
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Rejection:
    """A record that became no sample, and why; `line` of the source's file, from 1, where it has one."""

    record: int
    reason: str
    line: int | None = None


@dataclass(frozen=True)
class ShardState:
    """A finished shard; `shard` is None when all its records were rejected and there is no file.

    `notes`: what was done to load its records (`Source.take_notes`) and to store them -> how often.
    """

    file: str
    shard: Shard | None
    rejected: list[Rejection]
    notes: dict[str, int] = field(default_factory=dict)

    def save(self, out: Path) -> None:
        """Record the shard as finished."""
        atomic_write(_state_path(out, self.file), json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def load(cls, out: Path, file: str) -> Self | None:
        """The state of a finished shard, or None."""
        path = _state_path(out, file)
        if not path.exists():
            return None
        try:
            return to_record(parse_json(read_limited(path, INDEX_LIMIT), INDEX_LIMIT), cls)
        except (OSError, JsonError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and run the build again") from error

    def has_files(self, out: Path) -> bool:
        """Whether the shard's files are there, the tar in its full size."""
        if self.shard is None:
            return True
        tar = out / self.shard.file
        return (
            (out / self.shard.index_file).is_file()
            and tar.is_file()
            and tar.stat().st_size == self.shard.bytes
        )

    def is_intact(self, out: Path) -> bool:
        """Whether the shard's files are there and have the recorded hashes."""
        if self.shard is None:
            return True
        hashes = {self.shard.file: self.shard.hash, self.shard.index_file: self.shard.index_hash}
        return self.has_files(out) and all(hash_file(out / file) == value for file, value in hashes.items())


@dataclass(frozen=True)
class BuildPlan:
    """What all parts of a build agree on and `merge` needs to know.

    Attributes:
        name: name of the dataset; `source` that of its source.
        label_names, image_size: as in the index.
        records: number of records in the source.
        files: tar names of all planned shards, in order.
        tokenizer: folder or hub name, or None to train one of `vocab_size` pieces.
        min_patients: patients that must share a word of that vocabulary.
        arguments: everything the bytes of the dataset depend on.
        remarks: what the user should be told about the source (`Source.remarks`).
        published_counts: as the source says (`Source.published_counts`).
        version: of the format of its shards; plans before version 2 do not say it.
    """

    name: str
    source: str
    label_names: list[str]
    image_size: int
    records: int
    files: list[str]
    tokenizer: str | None
    vocab_size: int
    min_patients: int
    arguments: dict[str, Json]
    remarks: list[str] = field(default_factory=list)
    published_counts: list[PublishedCount] = field(default_factory=list)
    version: int = 1

    def save(self, out: Path) -> None:
        """Write the plan, or check that it is the one of the build going on in `out`.

        Raises:
            DataError: `out` holds a dataset, finished or not, that was built otherwise.
        """
        version, existing = self._existing(out) or (self.version, self.arguments)
        if version != self.version:
            raise DataError(
                f"{out} holds shards of format version {version}, this program writes {FORMAT_VERSION}; "
                "choose another --out"
            )
        # As text, because equal dicts may differ in their order, by which patients and labels are numbered.
        if json.dumps(existing) != json.dumps(self.arguments):
            difference = _difference(existing, self.arguments) or "in another order"
            raise DataError(
                f"{out} was built with other arguments ({difference}); choose another --out or delete it"
            )
        try:
            (out / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot create {out}: {error.strerror}; choose another --out") from error
        atomic_write(out / STATE_FOLDER / _PLAN_NAME, json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def load(cls, out: Path) -> Self:
        """Read the plan of the build going on in `out`.

        Raises:
            DataError: no build is going on there.
        """
        path = out / STATE_FOLDER / _PLAN_NAME
        try:
            return to_record(parse_json(read_limited(path, INDEX_LIMIT), INDEX_LIMIT), cls)
        except FileNotFoundError as error:
            raise DataError(f"{out} holds no unfinished build ({path} is missing)") from error
        except (OSError, JsonError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and run the build again") from error

    @staticmethod
    def _existing(out: Path) -> tuple[int, dict[str, Any]] | None:
        """Format version and arguments of what `out` holds."""
        if (out / INDEX_NAME).exists():
            index = Index.load(out)
            return index.version, index.arguments
        if (out / STATE_FOLDER / _PLAN_NAME).exists():
            plan = BuildPlan.load(out)
            return plan.version, plan.arguments
        return None


def restore_states(out: Path, plan: list[PlannedShard]) -> None:
    """Write the states of a finished dataset's shards again, from its index and list of rejected records.

    So running a finished build once more checks it, and rebuilds only what is missing or damaged.
    """
    if not (out / INDEX_NAME).exists():
        return
    rejections = _read_rejections(out)
    shards = {shard.file: shard for shard in Index.load(out).shards}
    for planned in plan:
        rejected = [rejections[record] for record in planned.records if record in rejections]
        ShardState(planned.file, shards.get(planned.file), rejected).save(out)


def _read_rejections(out: Path) -> dict[int, Rejection]:
    path = out / REJECTED_NAME
    if not path.exists():
        return {}
    rejections = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = parse_json(line, _LONGEST_LINE)
                rejection = to_record(
                    {name: entry.get(name) for name in ("record", "reason", "line")}, Rejection
                )
            except (JsonError, AttributeError) as error:
                raise DataError(
                    f"{path}, line {number}: damaged ({error}); build the dataset anew"
                ) from error
            rejections[rejection.record] = rejection
    return rejections


def _state_path(out: Path, file: str) -> Path:
    return out / STATE_FOLDER / f"{file.removesuffix('.tar')}.json"


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first argument that differs, by its dotted name; "" where the order alone does."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if json.dumps(before) == json.dumps(after):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            inner = _difference(before, after)
            return f"{name}.{inner}" if inner else f"{name}: in another order"
        return f"{name}: {json.dumps(before)} then, {json.dumps(after)} now"
    return ""

"""What a run was made from: `identity.json` and `tokenizer.json` in its folder, compared by content.

Tokenizer, shape of the encoders and a description of the dataset are stored with the run, so that everything
after its start uses or checks them wherever their sources have gone. A dataset is known by the hashes in its
index, so a remote one is compared without reading a shard.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import xxhash

from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.text import Tokenizer
from medvlp.runs.errors import AgreedError
from shards.atomic import atomic_write
from shards.errors import DataError
from shards.format import TOKENIZER_NAME, Index, Shard, hash_bytes, is_remote
from shards.reader import ShardReader
from shards.strict_json import parse_json, read_limited, to_record

#: In the run folder, beside the tokenizer itself (`tokenizer.json`).
IDENTITY = "identity.json"
FORMAT = 1
#: In a manifest, in place of a dataset's hash: the weights were imported.
_NO_DATA = "unknown"
#: Name of the side in pixels of the square that images are fitted into before evaluation cuts its view: in
#: the origin of imported weights whose publication cuts one, and in the header of an export's weights.
STORED_SIDE = "stored_side"
#: Name, there, of how DICOM films get the grey levels that the weights have learned from.
WINDOW = "dicom_window"
#: Largest `identity.json` and `tokenizer.json`, in bytes.
_LIMIT = 1 << 26
#: Shards of a local dataset that are asked for their licence.
ASKED_SHARDS = 32


class IdentityError(AgreedError):
    """Data, tokenizer or starting weights are not those of the run; names what differs and what to do."""

    exit_code = 4


@dataclass(frozen=True)
class DataRecord:
    """A dataset a run was trained on.

    Attributes:
        from_step: finished steps when the run began to read it.
        content: hash over all of the following that decides what a sample is: shards, labels, image size.
        name, fingerprint, image_size, label_names: from its index.
        tokenizer: hash of its own tokenizer; None without one.
        split: the one trained on.
        splits: split -> its totals, and `content`, the hash over its shards.
        licences: `license` fields of samples, sorted; "" where a sample says nothing.
        asked: number of samples they were read from; 0 for remote data, which nothing is fetched of.
        window: how DICOM films get the grey levels that its images have (`shards.dicom_windows.Window`);
            None: the index, or the version that recorded it, does not say.
        trained_tokenizer: what its tokenizer was trained on, if that was its own reports: "patients" of its
            training split, and "min_patients" that share a word (None: words of single patients are in it).
    """

    from_step: int
    content: str
    name: str
    fingerprint: str
    image_size: int
    label_names: list[str]
    tokenizer: str | None
    split: str
    splits: dict[str, dict[str, Any]]
    licences: list[str] = field(default_factory=list)
    asked: int = 0
    trained_tokenizer: dict[str, int | None] | None = None
    window: str | None = None

    @classmethod
    def of(cls, index: Index, split: str, from_step: int = 0) -> Self:
        """The record of a dataset, from its index alone; licences are not asked for."""
        splits = {
            name: dataclasses.asdict(totals) | {"content": _shards_hash(index.split_shards(name))}
            for name, totals in index.splits.items()
        }
        hashes = {name: values["content"] for name, values in splits.items()}
        content = _hash([hashes, index.label_names, index.image_size])
        return cls(
            from_step, content, index.name, index.fingerprint, index.image_size, list(index.label_names),
            index.tokenizer, split, splits,
            trained_tokenizer=_trained_tokenizer(index), window=_dicom_window(index),
        )  # fmt: skip

    def differences(self, now: DataRecord) -> list[str]:
        """What a reader has to know of a dataset with another content, one phrase each."""
        found = []
        for name in sorted(self.splits.keys() | now.splits.keys()):
            then, today = self.splits.get(name), now.splits.get(name)
            if then is None or today is None:
                found.append(f"split {name} is {'new' if then is None else 'gone'}")
            elif then["content"] != today["content"]:
                counts = f"{then['samples']} samples then, {today['samples']} now"
                same = then["samples"] == today["samples"]
                found.append(f"split {name}: " + ("as many samples, others" if same else counts))
        if self.label_names != now.label_names:
            found.append(f"labels: {len(self.label_names)} then, {len(now.label_names)} now, not the same")
        if self.image_size != now.image_size:
            found.append(f"stored images of {now.image_size} pixels, not {self.image_size}")
        return found


def _dicom_window(index: Index) -> str | None:
    """As the dataset was built from DICOM; MIMIC-CXR's JPEG files were equalised before they were ours."""
    source = index.arguments.get("source", {})
    options = source.get("options", {}) if isinstance(source, dict) else None
    if not isinstance(options, dict):  # not an index of ours
        return None
    return "equalize" if source.get("name") == "mimic-cxr" else str(options.get("window", "auto"))


def _trained_tokenizer(index: Index) -> dict[str, int | None] | None:
    named = index.arguments.get("tokenizer")
    if index.tokenizer is None or named is not None or "train" not in index.splits:
        return None
    least = index.arguments.get("min_patients")
    return {
        "patients": index.splits["train"].patients,
        "min_patients": least if type(least) is int else None,
    }


@dataclass(frozen=True)
class RunIdentity:
    """The content of `identity.json`.

    Attributes:
        tokenizer: hash of the run's `tokenizer.json`.
        special: names of the tokens that open, close and pad a text.
        named: `data.tokenizer` at the start; None: the dataset's own.
        data: datasets in the order in which the run read them; more than one after `data.allow_changed`, none
            of imported weights.
        encoders: "text" and "image" -> what a model that was named, not described, is built from
            (see `medvlp.runs.encoder_records`).
        start: "text", "image" and "run" -> hash of the weights that training began with: published ones, or
            those of another run (`train.start`).
        start_origin: of the run of `train.start`: "run", its name, and where it was imported, or began itself
            with imported weights, what is known of these ("title", "file", "sha256", "licence"); else {}.
        origin: of imported weights: where they come from (`medvlp.published`); {} of trained ones.
        lesson: what is learned of the dataset, by config key (the order of samples; a fine-tuning's task,
            fraction, ...); {} of versions that did not store it.
    """

    tokenizer: str
    special: tuple[str, str, str]
    named: str | None
    data: tuple[DataRecord, ...]
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    start: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    lesson: dict[str, str] = field(default_factory=dict)
    start_origin: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, str]:
        """What a checkpoint's manifest repeats."""
        return {
            "data": self.data[-1].content if self.data else _NO_DATA,
            "tokenizer": self.tokenizer,
            "encoders": _hash(
                [
                    self.encoders,
                    self.start,
                    *(said for said in (self.origin, self.lesson, self.start_origin) if said),
                ]
            ),
        }

    def check_lesson(self, now: Mapping[str, str], run: Path) -> None:
        """Refuse to learn something else in the folder `run`; what one side does not know is not compared.

        Raises:
            IdentityError: names the keys.
        """
        changed = [f"{key} was {self.lesson[key]} and is {value}" for key, value in now.items()
                   if self.lesson.get(key, value) != value]  # fmt: skip
        if changed:
            raise IdentityError(
                f"{run} learns something else: {'; '.join(changed)}. Use the old values, or choose a new "
                f"run.dir (train.start={run} begins with its weights)"
            )

    def trained_on(self, summary: Mapping[str, str]) -> DataRecord | None:
        """The dataset of the checkpoint whose manifest holds `summary`; None: imported weights."""
        found = (record for record in reversed(self.data) if record.content == summary.get("data"))
        return next(found, None)

    def at(self, step: int, summary: Mapping[str, str]) -> Self:
        """As it was at the checkpoint of `step` whose manifest holds `summary`.

        Later starts, which read other data, may have ended before they saved a checkpoint, or may have been
        left behind.
        """
        data = [record for record in self.data if record.from_step < step]
        while data and data[-1].content != summary.get("data"):
            data.pop()
        return dataclasses.replace(self, data=tuple(data)) if data else self

    def write(self, run: Path, tokenizer: Tokenizer) -> None:
        """Store this and the tokenizer in a run folder, each in one move.

        Raises:
            DataError: they cannot be written.
        """
        atomic_write(run / TOKENIZER_NAME, tokenizer.to_json())
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        atomic_write(run / IDENTITY, (json.dumps(values, indent=1) + "\n").encode())

    @classmethod
    def read(cls, run: Path, summary: Mapping[str, str]) -> tuple[Self, Tokenizer] | None:
        """What is stored in a run folder, if it is that of a checkpoint whose manifest holds `summary`.

        Returns:
            The identity and the run's tokenizer; None for runs of versions that stored neither.

        Raises:
            IdentityError: a file is missing, cannot be read, or is not the one the checkpoint was made with.
        """
        path = run / IDENTITY
        if not summary:
            return None
        try:
            values = parse_json(read_limited(path, _LIMIT), _LIMIT)
            if values.pop("format") != FORMAT:
                raise IdentityError(f"{path}: another format than {FORMAT}; use the version that wrote it")
            values["data"] = tuple(to_record(record, DataRecord) for record in values["data"])
            values["special"] = tuple(values["special"])
            identity = cls(**values)
            if not all(
                isinstance(of, str) for of in (*identity.origin.values(), *identity.start_origin.values())
            ):
                raise TypeError("an origin is told in texts")
            stored = read_limited(run / TOKENIZER_NAME, _LIMIT)
            tokenizer = Tokenizer.from_json(stored, str(run / TOKENIZER_NAME), identity.special)
            known = [record.content for record in identity.data] or [_NO_DATA]
            mixed = [name for name, value in identity.summary().items()
                     if name != "data" and value != summary.get(name)]  # fmt: skip
        except OSError as error:
            raise IdentityError(
                f"{error.filename} cannot be read ({error.strerror}), and the run's checkpoints belong to "
                "it: bring it back from a copy of the run folder"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise IdentityError(f"{path} and {TOKENIZER_NAME} beside it: not as a run stores them") from error
        if hash_bytes(stored) != identity.tokenizer or "tokenizer" in mixed:
            raise IdentityError(
                f"{run / TOKENIZER_NAME} is not the tokenizer of the run's checkpoint: bring back the one "
                "stored at its start"
            )
        if mixed or summary.get("data") not in known:
            raise IdentityError(f"{path} is not of the run's checkpoint: bring back the one stored with it")
        return identity, tokenizer


def unchecked(run: Path) -> str:
    """The line about a run of a version that stored no identity."""
    return (
        f"{run} was started by a version that stored no identity.json: whether its data and tokenizer are "
        "still those it was trained with cannot be checked"
    )


def check_tokenizer(tokenizer: Tokenizer, identity: RunIdentity, named: str | None, where: str) -> None:
    """Refuse another tokenizer than the run's where the config names one.

    Args:
        tokenizer: the run's.
        identity: of the run.
        named: `data.tokenizer` today.
        where: the run, for the message.

    Raises:
        IdentityError: it is another one.
        ConfigError: another name than at the start, and nothing can be loaded under it.
    """
    # A name of the hub says nothing new, and what was a folder may be gone: the run has its own copy.
    if named is None or (named == identity.named and not Path(named).exists()):
        return
    if Tokenizer.load(named, ".").fingerprint != tokenizer.fingerprint:
        raise IdentityError(
            f"data.tokenizer={named} is another tokenizer than the one {where} was trained with, which is "
            f"stored with it: leave data.tokenizer out (the run was started with "
            f"{identity.named or 'that of its dataset'}), or choose a new run.dir"
        )


def read_licences(reader: ShardReader, split: str) -> tuple[list[str], int]:
    """(sorted `license` fields, number of samples asked): the first sample of shards spread over the split.

    Raises:
        DataError: a sample cannot be read, or there is no such split.
    """
    shards = reader.index.split_shards(split)
    # Of remote data one shard is enough: each would be fetched whole.
    step = len(shards) if is_remote(reader.root) else max(1, -(-len(shards) // ASKED_SHARDS))
    position, licences, asked = 0, set(), 0
    for number, shard in enumerate(shards):
        if number % step == 0 and shard.samples:
            licences.add(str(reader.metadata(split, position).get("license") or ""))
            asked += 1
        position += shard.samples
    return sorted(licences), asked


def record_data(reader: ShardReader, config: Config, from_step: int) -> DataRecord:
    """The record of the dataset a run reads from now on, with the licences of a local one."""
    record = DataRecord.of(reader.index, config.data.split, from_step)
    if is_remote(reader.root):
        return record
    try:
        licences, asked = read_licences(reader, config.data.split)
    except DataError:  # training counts unreadable samples; a missing licence must not stop it
        return record
    return dataclasses.replace(record, licences=licences, asked=asked)


def _shards_hash(shards: Sequence[Shard]) -> str:
    return _hash([[shard.file, shard.samples, shard.hash, shard.index_hash] for shard in shards])


def _hash(value: Any) -> str:
    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())}"

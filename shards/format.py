"""Names and layout of a dataset folder: `index.json`, `.tar` shards and their `.idx` files."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import xxhash

from shards.errors import DataError
from shards.remote import STALL_SECONDS, read_remote
from shards.strict_json import PLAIN_NAME, JsonError, open_regular, parse_json, read_limited, to_record

#: What builds write. Version 1 had one index mask instead of a mask a finding, and no anatomy, phrases,
#: questions, lists, sides or readers.
FORMAT_VERSION = 2
#: What this program reads.
FORMAT_VERSIONS = (1, 2)
TOOL_VERSION = importlib.metadata.version("medvlp")
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
REJECTED_NAME = "rejected.jsonl"
IMAGE_EXTENSIONS = ("jpg", "png")
METADATA_EXTENSION = "json"
#: Masks of all findings below each other.
MASKS_EXTENSION = "masks.png"
#: The index mask of format version 1.
INDEX_MASK_EXTENSION = "mask.png"

#: Largest `index.json`, in bytes: some 300,000 shards.
INDEX_LIMIT = 1 << 26
#: Largest side of a stored image.
MAX_IMAGE_SIZE = 8192
#: Largest file of an image or of masks, in bytes: one that is read, and one that is stored.
IMAGE_LIMIT = 1 << 28
#: A member of a tar takes a block of 512 bytes for its name and at least one for its content.
MIN_MEMBER_BYTES = 1024

#: Of a dataset or label, in characters.
_LONGEST_NAME = 200
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")
_HASH = re.compile(r"[a-z0-9]{1,20}:[0-9a-f]{16,128}")


@dataclass(frozen=True)
class Shard:
    """One tar: name, split, number of samples, size in bytes, hashes of the tar and of its `.idx`."""

    file: str
    split: str
    samples: int
    bytes: int
    hash: str
    index_hash: str

    @property
    def index_file(self) -> str:
        """Name of the `.idx` file beside the tar."""
        return index_file_name(self.file)


@dataclass(frozen=True)
class SplitTotals:
    """What a split holds; `bytes` are those of its tars."""

    samples: int
    patients: int
    studies: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class Index:
    """The content of `index.json`.

    Attributes:
        name: name of the dataset.
        label_names: findings in the order of label vectors.
        splits: split name -> totals.
        shards: all shards, by split and number.
        image_size: side of the stored square images in pixels.
        tokenizer: hash of `tokenizer.json`; None where the dataset has no text to train one on.
        fingerprint: hash over the shards' hashes; equal fingerprints mean equal samples in equal order.
        arguments: what the dataset was built from and how.
        version, tool: version of this format and of the program that wrote it.
    """

    name: str
    label_names: list[str]
    splits: dict[str, SplitTotals]
    shards: list[Shard]
    image_size: int
    tokenizer: str | None
    fingerprint: str
    arguments: dict[str, Any]
    version: int = FORMAT_VERSION
    tool: str = f"medvlp {TOOL_VERSION}"

    @property
    def masks_extension(self) -> str:
        """Extension of the member that holds a sample's masks."""
        return INDEX_MASK_EXTENSION if self.version == 1 else MASKS_EXTENSION

    def split_shards(self, split: str) -> list[Shard]:
        """Shards of `split` in order.

        Raises:
            DataError: the dataset has no such split.
        """
        if split not in self.splits:
            raise DataError(f"dataset {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}")
        return [shard for shard in self.shards if shard.split == split]

    def to_json(self) -> bytes:
        """The bytes of `index.json`; the same index always gives the same bytes."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Parse `index.json`; `where` names it in errors.

        Raises:
            DataError: no JSON, another format version, or missing and unknown fields.
        """
        try:
            fields = parse_json(data, INDEX_LIMIT)
            version = fields.get("version") if isinstance(fields, dict) else None
            if type(version) is int and version not in FORMAT_VERSIONS:
                known = " and ".join(map(str, FORMAT_VERSIONS))
                raise DataError(f"{where}: format version {version}, this program reads {known}")
            index = to_record(fields, cls)
            index._check_values()
        except JsonError as error:
            raise DataError(f"{where}: not an index of shards ({error})") from error
        return index

    def _check_values(self) -> None:
        """Refuse what no build writes: values become file names, sizes of arrays, lines on a terminal."""
        for number, shard in enumerate(self.shards):
            place = f"shards[{number}]"
            if not PLAIN_NAME.fullmatch(shard.file) or not shard.file.endswith(".tar"):
                raise JsonError(f"{place}.file is no plain name of a .tar")
            if not _HASH.fullmatch(shard.hash) or not _HASH.fullmatch(shard.index_hash):
                raise JsonError(f"{place} has a hash that is none")
            if shard.split not in self.splits:
                raise JsonError(f"{place}.split is not among the splits")
            if not 0 <= shard.samples * MIN_MEMBER_BYTES <= shard.bytes < 2**53:
                raise JsonError(f"{place} cannot hold so many samples in so many bytes")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise JsonError("two shards have the same name")
        for name, totals in self.splits.items():
            if not _SPLIT_NAME.fullmatch(name):
                raise JsonError("the name of a split is no word of lower-case letters, digits and _")
            if not all(0 <= count < 2**53 for count in dataclasses.astuple(totals)):
                raise JsonError(f"the totals of split {name} are out of range")
        if not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise JsonError(f"image_size is not in 1..{MAX_IMAGE_SIZE}")
        for text in (self.name, self.tool, *self.label_names):
            if problem := name_problem(text):
                raise JsonError(f"a name {problem}")
        if len(set(self.label_names)) < len(self.label_names):
            raise JsonError("two labels have the same name")
        for text in (self.fingerprint, self.tokenizer or self.fingerprint):
            if not _HASH.fullmatch(text):
                raise JsonError("a hash is none")

    def contradictions(self) -> list[str]:
        """Where the index contradicts itself, one line each; empty when it does not."""
        problems = []
        for split, totals in self.splits.items():
            listed = sum(shard.samples for shard in self.shards if shard.split == split)
            if listed != totals.samples:
                problems.append(f"split {split} has {totals.samples} samples, its shards list {listed}")
        if fingerprint(self.shards) != self.fingerprint:
            problems.append("the fingerprint is not that of the listed shards")
        return problems

    @classmethod
    def load(cls, root: str | Path, stall_seconds: float = STALL_SECONDS) -> Self:
        """Read the index of a folder or of a URL prefix (`http://`, `https://`, `s3://`, `gs://`, `pipe:`).

        Args:
            root: where it lies.
            stall_seconds: see `shards.remote.download`.

        Raises:
            DataError: there is no index, or it cannot be read.
        """
        where = locate(root, INDEX_NAME)
        if is_remote(root):
            return cls.from_json(read_remote(where, INDEX_LIMIT, stall_seconds), where)
        path = Path(where)
        if not path.parent.is_dir():
            seen_from = "" if path.is_absolute() else f" below {Path.cwd()}"
            raise DataError(f"data folder {path.parent} does not exist{seen_from}")
        try:
            return cls.from_json(read_limited(path, INDEX_LIMIT), where)
        except FileNotFoundError as error:
            raise DataError(
                f"{path.parent} has no {INDEX_NAME}: not a dataset, or a build that has not finished"
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {where}: {error.strerror}") from error
        except JsonError as error:
            raise DataError(f"cannot read {where}: {error}") from error


def name_problem(text: str) -> str:
    """Why a text can be no name of a dataset or label, without any of it; "" where it can."""
    if len(text) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} characters"
    strange = next((sign for sign in text if not sign.isprintable()), "")
    return f"holds U+{ord(strange):04X}, which cannot be printed" if strange else ""


def is_remote(root: str | Path) -> bool:
    """Whether `root` is a URL prefix rather than a folder."""
    return isinstance(root, str) and (root.startswith("pipe:") or "://" in root)


def locate(root: str | Path, file: str) -> str:
    """Path or URL of `file` under `root`; in a `pipe:` command `{}` stands for the file name."""
    if not is_remote(root):
        return str(Path(root) / file)
    prefix = str(root)
    return prefix.replace("{}", file) if "{}" in prefix else f"{prefix.rstrip('/')}/{file}"


def shard_file_name(split: str, number: int) -> str:
    """Name of shard `number` of `split`."""
    return f"{split}-{number:06d}.tar"


def index_file_name(shard_file: str) -> str:
    """Name of the `.idx` file beside a tar."""
    return f"{shard_file.removesuffix('.tar')}.idx"


def sample_key(record: int, image: int) -> str:
    """Key of image `image` of record `record`: numbers only, so a key never says who the patient is."""
    return f"{record:08d}-{image}"


def hash_bytes(data: bytes | memoryview) -> str:
    """Hash of a file's content, as the index holds it."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"


def hash_file(path: Path) -> str:
    """`hash_bytes` of a file of any size.

    Raises:
        DataError: a pipe, socket or device.
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        descriptor = open_regular(path)
    except JsonError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        while block := file.read(1 << 20):
            digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


def fingerprint(shards: list[Shard]) -> str:
    """Hash over file names and hashes of all shards."""
    text = "".join(f"{shard.file} {shard.hash}\n" for shard in shards)
    return f"blake2b:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"

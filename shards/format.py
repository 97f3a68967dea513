"""Names and layout of a dataset folder: `index.json`, `.tar` shards and their `.idx` files."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import xxhash

from shards.errors import DataError

FORMAT_VERSION = 1
TOOL_VERSION = importlib.metadata.version("medvlp")
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
REJECTED_NAME = "rejected.jsonl"
IMAGE_EXTENSIONS = ("jpg", "png")
METADATA_EXTENSION = "json"
MASK_EXTENSION = "mask.png"


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
        label_names: findings in the order of label vectors and mask bits.
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
            fields = json.loads(data)
            if fields.get("version") != FORMAT_VERSION:
                raise DataError(
                    f"{where}: format version {fields.get('version')}, this program reads {FORMAT_VERSION}"
                )
            fields["splits"] = {name: SplitTotals(**totals) for name, totals in fields["splits"].items()}
            fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
            index = cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: not an index of shards ({error})") from error
        for shard in index.shards:
            if Path(shard.file).name != shard.file:
                raise DataError(f"{where}: shard name {shard.file!r} leaves the dataset folder")
        return index

    @classmethod
    def load(cls, root: str | Path) -> Self:
        """Read the index of a folder or of a URL prefix (`http://`, `https://`, `s3://`, `pipe:`).

        Raises:
            DataError: there is no index, or it cannot be read.
        """
        where = locate(root, INDEX_NAME)
        if is_remote(root):
            return cls.from_json(_read_remote(where), where)
        path = Path(where)
        if not path.parent.is_dir():
            raise DataError(f"data folder {path.parent} does not exist")
        try:
            return cls.from_json(path.read_bytes(), where)
        except FileNotFoundError as error:
            raise DataError(
                f"{path.parent} has no {INDEX_NAME}: not a dataset, or a build that has not finished"
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {where}: {error.strerror}") from error


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


def hash_bytes(data: bytes) -> str:
    """Hash of a file's content, as the index holds it."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"


def hash_file(path: Path) -> str:
    """`hash_bytes` of a file of any size."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


def fingerprint(shards: list[Shard]) -> str:
    """Hash over file names and hashes of all shards."""
    text = "".join(f"{shard.file} {shard.hash}\n" for shard in shards)
    return f"blake2b:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _read_remote(url: str) -> bytes:
    # Imported here: webdataset imports torch, which nothing else in this package needs.
    from webdataset.gopen import gopen

    try:
        with gopen(url, "rb") as stream:
            data: bytes = stream.read()
    except Exception as error:  # webdataset's openers raise whatever their transport raises
        raise DataError(f"cannot read {url}: {error}") from error
    if not data:
        raise DataError(f"cannot read {url}: nothing came back")
    return data

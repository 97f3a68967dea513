"""The `.idx` file beside a tar: byte offsets and sizes of every member, so that any sample is one `pread`."""

import json
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.strict_json import JsonError, open_regular, parse_json

#: Largest `.idx` file, in bytes: a million samples.
SHARD_INDEX_LIMIT = 1 << 26
#: Keys stand in messages, tables and file names.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")
_EXTENSION = re.compile(r"[a-z0-9]{1,10}(\.[a-z0-9]{1,10})?")
#: A tar holds whole blocks of 512 bytes; before each member's content stands a block with its name.
_BLOCK = 512

_MAGIC = b"MVLPIDX1"
_ABSENT = -1


def map_shard_index(path: Path) -> memoryview:
    """The bytes of an `.idx` file mapped into memory, which all processes that map it share.

    Whoever cuts the file short while it is mapped ends the process (SIGBUS); one that is replaced stays.

    Raises:
        OSError: it cannot be read.
        JsonError: a pipe, device or folder, empty, or larger than `SHARD_INDEX_LIMIT`.
    """
    with open(open_regular(path), "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        size = os.fstat(file.fileno()).st_size
        if not 0 < size <= SHARD_INDEX_LIMIT:
            raise JsonError(f"{size} bytes, not 1 to {SHARD_INDEX_LIMIT}")
        try:
            import pyarrow  # a tenth of a second of imports
        except ImportError:  # a bare GPU machine (tests/cuda): Python's own mapping keeps a descriptor each
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        with pyarrow.memory_map(str(path)) as mapped:
            return memoryview(mapped.read_buffer(size))


class Keys:
    """Sample keys in the order of the tar, a byte a character: of ten million samples 100 MB, not 700."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._ascii = np.array(keys, dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._ascii)

    def __getitem__(self, row: int) -> str:
        return str(self._ascii[row], "ascii")

    def __iter__(self) -> Iterator[str]:
        return (str(key, "ascii") for key in self._ascii)


@dataclass(frozen=True)
class ShardIndex:
    """Where every member of a tar lies: the content of an `.idx` file.

    Layout, little-endian: 8 bytes `MVLPIDX1`; uint32 length of the header; the header, a JSON object with
    `keys` and `extensions`, padded with spaces to a multiple of 8; int64 [samples, extensions, 2] of (offset,
    size) in bytes, offset -1 where a sample has no such member.

    Attributes:
        keys: sample keys in tar order.
        extensions: member extensions, in the order of the second axis.
        spans: int64 [samples, extensions, 2].
    """

    keys: Keys
    extensions: list[str]
    spans: NDArray[np.int64]

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) of the members of one sample."""
        pairs = zip(self.extensions, self.spans[sample].tolist(), strict=True)
        return {extension: (offset, size) for extension, (offset, size) in pairs if offset != _ABSENT}

    @classmethod
    def from_members(cls, samples: list[tuple[str, dict[str, tuple[int, int]]]]) -> Self:
        """Build from (key, {extension: (offset, size)}) pairs in tar order."""
        extensions = sorted({extension for _, members in samples for extension in members})
        spans = np.full((len(samples), len(extensions), 2), _ABSENT, dtype=np.int64)
        for row, (_, members) in enumerate(samples):
            for extension, span in members.items():
                spans[row, extensions.index(extension)] = span
        return cls(Keys([key for key, _ in samples]), extensions, spans)

    def to_bytes(self) -> bytes:
        """The bytes of the `.idx` file."""
        header = json.dumps(
            {"extensions": self.extensions, "keys": list(self.keys)}, separators=(",", ":")
        ).encode()
        header += b" " * (-(len(_MAGIC) + 4 + len(header)) % 8)
        return _MAGIC + struct.pack("<I", len(header)) + header + self.spans.astype("<i8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, where: str, size: int) -> Self:
        """Parse an `.idx` file.

        Args:
            data: content of the file, at most `SHARD_INDEX_LIMIT` bytes. `spans` stay where it lies: of a
                mapped file in pages that all processes share.
            where: names the file in errors.
            size: bytes of the tar it describes.

        Raises:
            DataError: another file format, a damaged file, or members that such a tar cannot have.
        """
        try:
            if data[: len(_MAGIC)] != _MAGIC:
                raise JsonError("wrong first bytes")
            keys, extensions, start = _header(data)
            if len(data) - start != 16 * len(keys) * len(extensions):
                raise JsonError("its length does not fit its keys")
            spans = np.frombuffer(data, dtype="<i8", offset=start).reshape(len(keys), len(extensions), 2)
            _check_spans(spans, size)
        except (JsonError, struct.error) as error:
            raise DataError(f"{where}: damaged shard index ({error}); rebuild the dataset") from error
        return cls(Keys(keys), extensions, spans)


def _header(data: bytes | memoryview) -> tuple[list[str], list[str], int]:
    """Keys, extensions, and where the array begins."""
    start = len(_MAGIC) + 4
    (length,) = struct.unpack("<I", data[len(_MAGIC) : start])
    header = parse_json(bytes(data[start : start + length]), SHARD_INDEX_LIMIT)
    if not isinstance(header, dict) or header.keys() != {"keys", "extensions"}:
        raise JsonError("its header is not keys and extensions")
    for name, pattern in (("keys", _KEY), ("extensions", _EXTENSION)):
        values = header[name]
        if not isinstance(values, list) or not all(
            isinstance(value, str) and pattern.fullmatch(value) for value in values
        ):
            raise JsonError(f"its {name} are not plain names")
        if len(set(values)) < len(values):
            raise JsonError(f"two of its {name} are equal")
    return header["keys"], header["extensions"], start + length


def _check_spans(spans: NDArray[np.int64], size: int) -> None:
    """Every member inside the tar, sample after sample, and none in another one."""
    offsets, sizes = spans[..., 0], spans[..., 1]
    absent = offsets == _ABSENT
    if not (
        (offsets >= _BLOCK) & (sizes >= 0) & (sizes <= size - offsets) | absent & (sizes == _ABSENT)
    ).all():
        raise JsonError("a member lies outside its shard")
    if absent.all(axis=1).any():
        raise JsonError("a sample has no member")
    # The members of a sample may stand in any order; samples follow each other.
    order = np.argsort(np.where(absent, np.iinfo(np.int64).max, offsets), axis=1, kind="stable")
    present = ~np.take_along_axis(absent, order, axis=1)
    begins = np.take_along_axis(offsets, order, axis=1)[present]
    ends = begins + np.take_along_axis(sizes, order, axis=1)[present]
    if (begins[1:] < ends[:-1] + _BLOCK).any():
        raise JsonError("its members overlap or are not in the order of the tar")

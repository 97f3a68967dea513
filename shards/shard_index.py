"""The `.idx` file beside a tar: byte offsets and sizes of every member, so that any sample is one `pread`."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError

_MAGIC = b"MVLPIDX1"
_ABSENT = -1


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

    keys: list[str]
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
        return cls([key for key, _ in samples], extensions, spans)

    def to_bytes(self) -> bytes:
        """The bytes of the `.idx` file."""
        header = json.dumps(
            {"extensions": self.extensions, "keys": self.keys}, separators=(",", ":")
        ).encode()
        header += b" " * (-(len(_MAGIC) + 4 + len(header)) % 8)
        return _MAGIC + struct.pack("<I", len(header)) + header + self.spans.astype("<i8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Parse an `.idx` file; `where` names it in errors.

        Raises:
            DataError: another file format or a damaged file.
        """
        start = len(_MAGIC) + 4
        try:
            if not data.startswith(_MAGIC):
                raise ValueError("wrong first bytes")
            (length,) = struct.unpack("<I", data[len(_MAGIC) : start])
            header = json.loads(data[start : start + length])
            keys, extensions = list(header["keys"]), list(header["extensions"])
            spans = np.frombuffer(data, dtype="<i8", offset=start + length)
            spans = spans.reshape(len(keys), len(extensions), 2)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise DataError(f"{where}: damaged shard index ({error}); rebuild the dataset") from error
        return cls(keys, extensions, spans)

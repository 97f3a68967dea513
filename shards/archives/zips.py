"""Members of a zip file by name, in bounded memory and without unpacking it to disk.

`zipfile.ZipFile` keeps a Python object for each member (230,000 reports take 160 MB) in every process of a
build. Here a member is five numbers in arrays; the standard library still reads directory and content.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from shards.errors import DataError

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LOCAL_MAGIC = b"PK\3\4"
_ENCRYPTED, _UTF8_NAME = 0x1, 0x800
_FIELDS = np.dtype(
    [("key", "u8"), ("offset", "u8"), ("packed", "u8"), ("size", "u8"), ("crc", "u4"), ("kind", "u2")]
)


@dataclass(frozen=True)
class ZipMember:
    """A file inside a zip: `path` of the zip, `inside` its name there, `size` its bytes when unpacked."""

    path: Path
    inside: str
    size: int
    start: int
    packed: int
    crc: int
    kind: int

    @property
    def name(self) -> str:
        """Its last name, without folders."""
        return self.inside.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.path}:{self.inside}"

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Its content, never more than `size` bytes, its checksum compared at the end.

        Raises:
            DataError: it is packed in a way that the standard library does not know.
            OSError: the zip cannot be read.
        """
        info = zipfile.ZipInfo(self.inside)
        info.file_size, info.compress_size = self.size, self.packed
        info.CRC, info.compress_type = self.crc, self.kind
        file: Any = self.path.open("rb")
        try:
            file.seek(self.start)
            return cast(BinaryIO, zipfile.ZipExtFile(file, "r", info, close_fileobj=True))
        except NotImplementedError as error:
            file.close()
            # Names of members may hold those of patients.
            raise DataError(f"{self.path.name}: {error}; unpack the zip") from error


class ZipIndex:
    """The members of a zip file, found by name without regard to case.

    Raises:
        DataError: it is no complete zip file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tops: dict[str, None] = {}
        rows = []
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    name = _slashed(info.filename)
                    top, slash, _ = name.partition("/")
                    if slash and len(tops) <= MOST_TOPS:
                        tops[top] = None
                    if not name.endswith("/"):
                        # An encrypted member has no kind that can be read.
                        kind = 0xFFFF if info.flag_bits & _ENCRYPTED else info.compress_type
                        where = (info.header_offset, info.compress_size, info.file_size)
                        rows.append((_key(name), *where, info.CRC, kind))
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:  # names, versions
            raise DataError(f"{path} is not a complete zip file ({error}); download it again") from error
        self._rows = np.sort(np.array(rows, dtype=_FIELDS), order=["key", "offset"])
        #: Folders at the top, where they are few enough to be searched.
        self.tops = sorted(tops) if len(tops) <= MOST_TOPS else []

    def find(self, name: str) -> ZipMember | None:
        """The member of that name; where several differ in case only, that which is written just so.

        Raises:
            DataError: it is encrypted, several are meant, or the zip is damaged.
        """
        first = int(np.searchsorted(self._rows["key"], np.uint64(_key(name))))
        found = []
        for row in self._rows[first:]:
            if row["key"] != _key(name):
                break
            member = self._member(row)
            if member.inside == name:
                return member
            if member.inside.casefold() == name.casefold():
                found.append(member)
        if len(found) > 1:
            raise DataError(f"{self.path.name}: several members differ in upper and lower case only")
        return found[0] if found else None

    def names(self) -> Iterator[str]:
        """All members' names."""
        with zipfile.ZipFile(self.path) as archive:
            names = map(_slashed, archive.namelist())
            yield from (name for name in names if not name.endswith("/"))

    def _member(self, row: Any) -> ZipMember:
        offset = int(row["offset"])
        with self.path.open("rb") as file:
            file.seek(offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or header[:4] != _LOCAL_MAGIC:
                raise DataError(f"{self.path} is damaged or has changed; download it again")
            fields = _LOCAL_HEADER.unpack(header)
            name, extra = fields[9], fields[10]
            try:
                inside = _slashed(file.read(name).decode("utf-8" if fields[2] & _UTF8_NAME else "cp437"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.path} is damaged: a name in it is no text; download it again"
                ) from error
        if row["kind"] == 0xFFFF:
            raise DataError(f"{self.path.name}: a member is encrypted; unpack the zip")
        start = offset + _LOCAL_HEADER.size + name + extra
        numbers = (int(row[field]) for field in ("size", "packed", "crc", "kind"))
        size, packed, crc, kind = numbers
        return ZipMember(self.path, inside, size, start, packed, crc, kind)


#: Folders at the top of an archive that are searched for a file; more are patients or studies, not releases.
MOST_TOPS = 64


def _slashed(name: str) -> str:
    """A member's name with "/": old programs on Windows write backslashes."""
    return name.replace("\\", "/")


def _key(name: str) -> int:
    # A table may ask for half a surrogate pair, which is no member's name.
    data = name.casefold().encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")

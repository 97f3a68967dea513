"""Files of an archive by relative path: unpacked or in zips, in any case, with or without ".gz"."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from shards.archives.walk import is_companion, leaves, walk
from shards.archives.zips import MOST_TOPS, ZipIndex, ZipMember
from shards.errors import DataError
from shards.format import IMAGE_LIMIT

_GZIP = ".gz"
_PACKED = (".tar", ".tar.gz", ".tgz", ".rar", ".7z")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class FolderMember:
    """A file of an unpacked archive."""

    path: Path

    @property
    def name(self) -> str:
        """Its last name, without folders."""
        return self.path.name

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.path.stat().st_size

    def __str__(self) -> str:
        return str(self.path)

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Its content."""
        return self.path.open(mode)


Member = FolderMember | ZipMember


class ArchiveFiles:
    """The files below a root: the unpacked archive, one of its zips, or a folder that holds its zips.

    A path is looked for at the root, then in each folder just below it (the release's own folder, parts such
    as `images_001`), then in the zips in the same way. Names are compared without regard to case where none
    is written just so. Paths in tables are never trusted: absolute ones and ".." are refused.

    Args:
        root: folder or zip file.
        origin: where the archive is to be had, for messages.
        deep: look in the folders below the root and in zips too; not for a file that the user names.

    Raises:
        DataError: `root` is neither.
    """

    def __init__(self, root: Path, origin: str, *, deep: bool = True) -> None:
        self.root = root
        self.origin = origin
        self._deep = deep
        self._zips: list[ZipIndex] | None = None
        if root.is_dir():
            self._folder: Path | None = root
        elif root.is_file() and root.suffix.lower() == ".zip":
            self._folder, self._zips = None, [ZipIndex(root)]
        else:
            raise DataError(f"{root} is neither a folder nor a zip file; get the archive from {origin}")

    def find(self, path: str, *, or_gzip: bool = False) -> Member | None:
        """The first file of that path, or None.

        Args:
            path: relative to the root, with "/" or backslashes.
            or_gzip: take it with or without ".gz".

        Raises:
            DataError: the path leaves the archive, only upper and lower case tell several files apart, or the
                system refuses to look (a name too long, a folder without permission).
        """
        for wanted in _forms(path, or_gzip):
            for member in self._found(wanted):
                return member
        return None

    def get(self, *paths: str, or_gzip: bool = True) -> Member:
        """The one file that has one of these paths, the first of them that is there.

        Raises:
            DataError: there is none, it says where to get it; or it is in several folders.
        """
        for path in paths:
            for wanted in _forms(path, or_gzip):
                found = list(self._found(wanted))
                if len(found) > 1:
                    raise DataError(f"{found[0]} and {found[1]} are both there; let --root name one release")
                if found:
                    return found[0]
        names = " or ".join(paths)
        gzip = f" (or {_GZIP})" if or_gzip and not paths[0].endswith(_GZIP) else ""
        raise DataError(f"{self.root} has no {names}{gzip}; get it from {self.origin}{self._hint()}")

    def read(self, path: str, most: int = IMAGE_LIMIT) -> bytes:
        """Content of a file of at most `most` bytes.

        Raises:
            DataError: there is none, it is larger, or it cannot be read. The path is not said, since it may
                name a patient.
        """
        member = self.find(path)
        if member is None:
            raise DataError("file does not exist in the archive")
        return read_member(member, most)

    def names(self, suffix: str) -> Iterator[str]:
        """Paths of all files that end in `suffix`, in alphabetical order; folders before zips.

        Each is for `listed`: `find` may take it for another file one folder deeper. Links are followed, and
        companions that macOS writes beside files are passed over.

        Raises:
            DataError: a folder cannot be listed.
        """
        suffix = suffix.casefold()
        if self._folder is not None:
            for name in walk(self._folder):
                if name.casefold().endswith(suffix) and not is_companion(name):
                    yield name
        for index in self._indexes():
            for name in sorted(index.names()):
                if name.casefold().endswith(suffix) and not is_companion(name):
                    yield name

    def listed(self, name: str) -> Member:
        """The file of a path of `names`, at that very place only.

        Raises:
            DataError: it is gone, would leave the archive, or the system refuses to look.
        """
        if leaves(name):
            raise DataError("path leaves the archive")
        try:
            if self._folder is not None and (self._folder / name).is_file():
                return FolderMember(self._folder / name)
            for index in self._indexes():
                if (packed := index.find(name)) is not None:
                    return packed
        except OSError as error:  # its text holds the path, which may name a patient
            raise DataError(f"file cannot be looked for: {error.strerror or type(error).__name__}") from error
        raise DataError("file is gone")

    def _found(self, path: str) -> Iterator[Member]:
        """Files of that very path, at the root or one folder below it; zips only where no folder has any."""
        path = _relative(path)
        try:
            unpacked = list(_in_folder(self._folder, path, self._deep)) if self._folder is not None else []
            yield from unpacked or (self._in_zips(path) if self._deep else [])
        except OSError as error:  # its text holds the path, which may name a patient
            raise DataError(f"file cannot be looked for: {error.strerror or type(error).__name__}") from error

    def _in_zips(self, path: str) -> Iterator[Member]:
        for index in self._indexes():
            for place in (path, *(f"{top}/{path}" for top in index.tops)):
                if (packed := index.find(place)) is not None:
                    yield packed

    def _indexes(self) -> list[ZipIndex]:
        if self._zips is None:
            assert self._folder is not None
            self._zips = [ZipIndex(path) for path in sorted(self._folder.iterdir()) if _is_zip(path)]
        return self._zips

    def _hint(self) -> str:
        names = sorted(path.name for path in self._folder.iterdir()) if self._folder is not None else []
        packed = [name for name in names if name.lower().endswith(_PACKED) and not is_companion(name)]
        return f" (if it is in {packed[0]}, unpack that)" if packed else ""


def read_member(member: Member, most: int = IMAGE_LIMIT) -> bytes:
    """Content of a file of at most `most` bytes.

    Raises:
        DataError: it is larger, no regular file, damaged, or cannot be read.
    """
    try:
        if isinstance(member, FolderMember) and not stat.S_ISREG(member.path.stat().st_mode):
            raise DataError("not a regular file")  # a pipe would be waited for
        if member.size > most:
            raise DataError(f"file of {member.size:,} bytes is larger than the limit of {most:,}")
        with member.open() as file:
            content = file.read(most + 1)
    except OSError as error:
        raise DataError(f"file cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a damaged member of a zip leads to
        if isinstance(error, DataError):
            raise
        raise DataError(f"damaged in its zip ({type(error).__name__})") from error
    if len(content) != member.size:
        raise DataError("file is not as long as its archive says")
    return content


def _forms(path: str, or_gzip: bool) -> list[str]:
    if not or_gzip:
        return [path]
    is_packed = path.lower().endswith(_GZIP)
    return [path, path[: -len(_GZIP)] if is_packed else path + _GZIP]


def _relative(path: str) -> str:
    path = path.replace("\\", "/")
    if leaves(path) or _DRIVE.match(path):
        raise DataError("path leaves the archive")
    return "/".join(PurePosixPath(path).parts)


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file() and not is_companion(path.name)


def _in_folder(root: Path, path: str, deep: bool) -> Iterator[Member]:
    places = [root, *(_tops(root) if deep else [])]
    exact = [place / path for place in places if (place / path).is_file()]
    if not exact:  # listing folders costs more than looking for one name
        exact = [found for place in places if (found := _any_case(place, path)) is not None]
    yield from map(FolderMember, exact)


def _tops(root: Path) -> list[Path]:
    listing = _folders(str(root), root.stat().st_mtime_ns)
    return [root / name for name in listing] if len(listing) <= MOST_TOPS else []


def _any_case(place: Path, path: str) -> Path | None:
    for part in PurePosixPath(path).parts:
        try:
            changed = place.stat().st_mtime_ns
            names = _listing(str(place), changed).get(part.casefold(), ())
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(names) > 1 and part not in names:
            raise DataError("several files differ in upper and lower case only")
        if not names:
            return None
        place = place / (part if part in names else names[0])
    return place if place.is_file() else None


@lru_cache(maxsize=64)
def _listing(folder: str, changed: int) -> dict[str, tuple[str, ...]]:
    """Names in a folder by their folded form; `changed` is when the folder last did."""
    names: dict[str, tuple[str, ...]] = {}
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 - names, not paths
        names[name.casefold()] = (*names.get(name.casefold(), ()), name)
    return names


@lru_cache(maxsize=64)
def _folders(folder: str, changed: int) -> tuple[str, ...]:
    """Folders in a folder, at most one more than are searched."""
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found.append(entry.name)
            if len(found) > MOST_TOPS:
                break
    return tuple(sorted(found))

"""Paths of the files below a folder."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.errors import DataError

_Folder = tuple[int, int]


def walk(root: Path) -> Iterator[str]:
    """Relative paths of all files below a folder, a folder's own before those of the folders in it, by name.

    Links are followed; a link to a folder above itself is passed over.

    Raises:
        DataError: a folder cannot be listed. It is not said which, since it may be named after a patient.
    """
    waiting: list[tuple[str, frozenset[_Folder]]] = [("", frozenset())]
    while waiting:
        place, above = waiting.pop()
        try:
            status = (root / place).stat()
            this = (status.st_dev, status.st_ino)
            if this in above:
                continue
            with os.scandir(root / place) as entries:
                found = sorted((entry.name, entry.is_dir()) for entry in entries)
        except OSError as error:
            raise DataError(
                f"a folder below {root} cannot be listed ({error.strerror or type(error).__name__}), so what "
                f"lies in it is not known; `find -L {root} > /dev/null` names it"
            ) from error
        yield from (place + name for name, is_folder in found if not is_folder)
        below = [f"{place}{name}/" for name, is_folder in found if is_folder]
        waiting += [(path, above | {this}) for path in reversed(below)]


def is_companion(path: str) -> bool:
    """Whether a path is what macOS writes beside the file of that name: `._a.png`, `__MACOSX/a.png`."""
    parts = PurePosixPath(path).parts
    return bool(parts) and (parts[-1].startswith("._") or "__MACOSX" in parts)


def leaves(path: str) -> bool:
    """Whether a relative path, with "/", would lead out of its folder."""
    return path.startswith("/") or ".." in PurePosixPath(path).parts or "\0" in path

"""Finds the image a table names: however the path was written, and only below the image folder."""

from __future__ import annotations

import posixpath
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.sources.base import RejectedRecord

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
BACKSLASHES = "image paths were written with backslashes"
UNICODE_FORM = "image files were found under another Unicode form of their name (NFC or NFD)"


class ImagePaths:
    """Paths below an image folder.

    Args:
        folder: what relative paths start from; absolute ones must lie below it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._names = [str(self._folder).rstrip("/") + "/", str(folder.resolve()).rstrip("/") + "/"]
        #: What was done to find images -> number of images.
        self.notes: Counter[str] = Counter()

    def identity(self, name: str) -> str:
        """The same text for all ways to write a path: "./a.png", "a.png/"; no file is looked at."""
        path = posixpath.normpath(name.replace("\\", "/"))
        return unicodedata.normalize("NFC", self._relative(path))

    def find(self, name: str) -> Path:
        """The file of an image path.

        Raises:
            RejectedRecord: it leaves the folder, does not exist, or is no regular file.
        """
        path = self.seek(name)
        if path is None:
            raise RejectedRecord("image file does not exist")
        return path

    def seek(self, name: str) -> Path | None:
        """The file of an image path, or None where there is none; other errors as `find`."""
        for path, note in self._ways(name):
            try:
                mode = path.stat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise RejectedRecord(f"image file cannot be read: {error.strerror}") from error
            if not stat.S_ISREG(mode):  # a pipe would be waited for
                raise RejectedRecord("image is not a regular file")
            self.notes.update([note] if note else [])
            return path
        return None

    def _ways(self, name: str) -> Iterator[tuple[Path, str | None]]:
        """The path as it is written, then other ways to read it, each with what is to be said about it."""
        yield self._below(name), None
        slashed = name.replace("\\", "/")
        if slashed != name:
            yield self._below(slashed), BACKSLASHES
        for form in ("NFC", "NFD"):
            normal = unicodedata.normalize(form, slashed)
            if normal != slashed:
                yield self._below(normal), UNICODE_FORM

    def _below(self, name: str) -> Path:
        path = PurePosixPath(self._relative(name))
        if path.is_absolute() or ".." in path.parts or _DRIVE.match(name):
            raise RejectedRecord("image path leaves the image folder")
        return self._folder / path

    def _relative(self, path: str) -> str:
        """An absolute path below the folder without the folder's name, whether it is a link or not."""
        prefix = next((name for name in self._names if path.startswith(name)), "")
        return path.removeprefix(prefix)

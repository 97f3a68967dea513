"""Files that appear under their final name only when they are complete and on disk."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shards.errors import DataError

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing under a temporary name; fsync and rename it when the block ends well.

    The temporary name holds host and process id, so two writers never share it. After any error the
    temporary file is removed and `path` is as it was.

    Raises:
        DataError: the file cannot be written (full disk, quota, no permission).
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write {path}: {reason}; mend that, then run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def remove_leftovers(folder: Path, name: str) -> None:
    """Delete temporary files that a killed writer of `folder / name` left behind."""
    for leftover in folder.glob(f".{name}.*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

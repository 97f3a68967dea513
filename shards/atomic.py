"""Files and folders that appear under their final name only when they are complete and on disk."""

import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shards.errors import DataError

TEMPORARY_SUFFIX = ".tmp"
_PARTIAL_SUFFIX = ".partial"
#: Seconds without a write after which a temporary file of another host has no writer any more.
_FOREIGN_SECONDS = 3600


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
        fsync_path(path.parent)
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
    """Delete temporary files that a killed writer of `folder / name` left behind.

    Those of living processes of this host stay, and those of other hosts that were written to within the last
    hour: of these nobody here knows whether their process lives.
    """
    start = f".{name}."
    for leftover in folder.glob(f"{glob.escape(start)}*{TEMPORARY_SUFFIX}"):
        writer = leftover.name.removeprefix(start).removesuffix(TEMPORARY_SUFFIX)
        host, _, process = writer.rpartition("-")
        with suppress(FileNotFoundError):  # its writer has ended, or another one clears up too
            if host == socket.gethostname():
                left = not _lives(process)
            else:
                left = time.time() - leftover.stat().st_mtime > _FOREIGN_SECONDS
            if left:
                leftover.unlink()


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Give a new folder beside `path`; fsync all of it and rename it when the block ends well.

    The temporary name holds host and process id, so two writers never mix their files: the first to end has
    `path`, and without `replace` the other is refused. After an error nothing is left. What a killed writer
    left is removed by the next one on its host.

    Args:
        path: a place that is free, or an empty folder.
        replace: take the place of a folder that is there.

    Raises:
        OSError: the folder cannot be written, or `path` is taken.
    """
    final = path.resolve()
    start = f".{final.name}.{socket.gethostname()}-"
    temporary = final.with_name(f"{start}{os.getpid()}{_PARTIAL_SUFFIX}")
    replaced = temporary.with_suffix(".replaced")
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.iterdir():
        name = leftover.name
        if name.startswith(start) and not _lives(name.removeprefix(start).partition(".")[0]):
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for inner in temporary.rglob("*"):
            fsync_path(inner)
        fsync_path(temporary)
        if replace and final.exists():
            final.rename(replaced)
        temporary.rename(final)  # an empty folder gives way
        fsync_path(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _lives(pid: str) -> bool:
    """Whether a process of this host lives, or what should be its id is none."""
    if not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def fsync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

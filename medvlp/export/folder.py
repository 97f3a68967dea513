"""A folder that appears under its final name only when everything in it is complete and on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from medvlp.runs.state_files import fsync_folder
from shards.errors import MedvlpError


class ExportError(MedvlpError):
    """A run cannot be exported as asked, or the folder cannot be written; the message says what to do."""

    exit_code = 4


def check_free(folder: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        ExportError: `folder` is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is not an empty folder: choose another --out, or remove it first")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; fsync all of it and rename it when the block ends well.

    After an error nothing is left. What a killed export left is removed by the next one to the same place.

    Raises:
        ExportError: as `check_free`, or the disk refused.
    """
    final = folder.resolve()
    temporary = final.with_name(f".{final.name}.partial")
    try:
        check_free(final)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        _fsync_tree(temporary)
        temporary.rename(final)  # replaces an empty folder
        fsync_folder(final.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(f"{folder} cannot be written: {reason}; mend that, and export again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)

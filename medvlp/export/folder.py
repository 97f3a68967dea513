"""A folder that appears under its final name only when everything in it is complete and on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from shards.atomic import atomic_folder
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
    """As `shards.atomic.atomic_folder`, with its errors as an export's.

    Raises:
        ExportError: as `check_free`, or the disk refused.
    """
    try:
        check_free(folder)
        with atomic_folder(folder) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(f"{folder} cannot be written: {reason}; mend that, and export again") from error

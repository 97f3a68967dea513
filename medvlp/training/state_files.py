"""State as a list of files to write: collecting is apart from writing, so that writing can happen later."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors.torch
import torch
import xxhash


@dataclass
class StateFile:
    """A file of a checkpoint: where it goes, and the tensors and plain values it holds."""

    path: Path
    content: Any

    def write(self) -> None:
        """Write `.safetensors` or torch's zip format, then fsync.

        Raises:
            OSError: the disk refused.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            if self.path.suffix == ".safetensors":
                file.write(safetensors.torch.save(self.content))
            else:
                _save(self.content, file)
            file.flush()
            os.fsync(file.fileno())


def _save(content: Any, file: BinaryIO) -> None:
    """`torch.save`, which hides a full disk behind a RuntimeError about the position in its zip file."""
    guarded = _RememberingFile(file)
    try:
        torch.save(content, cast("BinaryIO", guarded))
    except RuntimeError:
        if guarded.refusal is None:
            raise
        raise guarded.refusal from None


class _RememberingFile:
    """A file to write to that keeps the first error of the disk."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.refusal: OSError | None = None

    def write(self, data: bytes) -> int:
        """As the file's own."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.refusal = self.refusal or error
            raise

    def flush(self) -> None:
        """As the file's own."""
        try:
            self._file.flush()
        except OSError as error:
            self.refusal = self.refusal or error
            raise


def read_state(path: Path, classes: Sequence[type] = ()) -> Any:
    """Read a torch file with tensors, plain values and `classes` on the CPU; no code in it is executed."""
    with torch.serialization.safe_globals(list(classes)):
        return torch.load(path, map_location="cpu", weights_only=True)


def checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes, as hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

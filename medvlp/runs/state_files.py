"""State as a list of files to write: collecting is apart from writing, so that writing can happen later."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash
from torch import Tensor

from medvlp.runs.errors import CheckpointError
from medvlp.tensor_files import TensorFileError, read_torch_file
from shards.progress import tracked

#: Bytes handed to the disk at once; between two pieces a write can be given up.
_PIECE = 1 << 22
#: Bytes of a file from which on its check shows how far it is.
SHOWN = 1 << 30

#: Names of number formats in safetensors' header.
_FORMATS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


class WriteGivenUpError(OSError):
    """Nobody wants the file any more."""


def _never() -> bool:
    return False


@dataclass
class StateFile:
    """A file of a checkpoint: where it goes, and the tensors and plain values it holds.

    A `.safetensors` file holds a dict of tensors on the CPU, and `metadata` as text in its header; any other
    name means torch's zip format.
    """

    path: Path
    content: Any
    metadata: Mapping[str, str] = field(default_factory=dict)

    def write(self, given_up: Callable[[], bool] = _never) -> dict[str, Any]:
        """Write the file and fsync it.

        Args:
            given_up: asked between pieces; True ends the write.

        Returns:
            The manifest's entry: {"bytes": size, "xxh3_128": checksum of what was handed to the disk}.

        Raises:
            OSError: the disk refused, or the write was given up (`WriteGivenUpError`).
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb", buffering=0) as raw:
            file = _CheckedFile(raw, given_up)
            if self.path.suffix == ".safetensors":
                _write_tensors(file, self.content, self.metadata)
            else:
                _save(self.content, file)
            os.fsync(raw.fileno())
        return {"bytes": file.size, "xxh3_128": file.digest.hexdigest()}


class _CheckedFile:
    """A file to write to that sums up what it was given and keeps the first error of the disk."""

    def __init__(self, file: BinaryIO | Any, given_up: Callable[[], bool] = _never):
        self._file = file
        self._given_up = given_up
        self.size = 0
        self.digest = xxhash.xxh3_128()
        self.refusal: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`, in pieces."""
        view = memoryview(data)
        try:
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                self.digest.update(piece)
                self._write_piece(piece)
        except OSError as error:
            self.refusal = self.refusal or error
            raise
        self.size += len(view)
        return len(view)

    def _write_piece(self, piece: memoryview) -> None:
        while piece:
            if self._given_up():
                raise WriteGivenUpError("the write was given up")
            piece = piece[self._file.write(piece) :]

    def flush(self) -> None:
        """Nothing is held back."""


def _write_tensors(file: _CheckedFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The safetensors format, written from the tensors' own memory.

    Hand-written because safetensors' own writer keeps the file to itself: checksum and fsync would have to
    open and read it again, and writing could not be given up half-way.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _save(content: Any, file: _CheckedFile) -> None:
    """`torch.save`, which hides a full disk behind a RuntimeError about the position in its zip file."""
    try:
        torch.save(content, cast("BinaryIO", file))
    except RuntimeError:
        if file.refusal is None:
            raise
        raise file.refusal from None


def read_state(path: Path) -> Any:
    """Read a torch file with tensors and plain values on the CPU; no code in it is executed.

    Raises:
        CheckpointError: it cannot be read, or is not one.
    """
    try:
        return read_torch_file(path)
    except (OSError, TensorFileError) as error:
        raise CheckpointError(f"{path} cannot be read as state ({error})") from error


def checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes, as hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        pieces: Iterable[bytes] = iter(lambda: file.read(_PIECE), b"")
        if size >= SHOWN:
            pieces = tracked(pieces, f"checking bytes of {path.parent.name}/{path.name}", size, size=len)
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()

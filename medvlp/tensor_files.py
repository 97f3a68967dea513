"""Reading torch files of strangers: no code in them runs, and memory is taken only for bytes they have."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


class TensorFileError(ValueError):
    """What is wrong with a file of tensors, in one line."""


def read_torch_file(path: Path) -> Any:
    """Tensors and plain values of a torch file, on the CPU.

    Raises:
        OSError: it cannot be read.
        TensorFileError: it is no torch file, is damaged, holds more than tensors and plain values, or is
            packed so that it would grow in memory (torch writes its zip files unpacked).
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise TensorFileError("it claims more bytes than it has")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, TensorFileError):
        raise
    except pickle.UnpicklingError:
        raise TensorFileError(
            "not a torch file, or one that holds more than tensors and plain values"
        ) from None
    except Exception as error:  # torch's reader raises whatever a damaged pickle or zip leads to
        raise TensorFileError(f"damaged ({type(error).__name__})") from error

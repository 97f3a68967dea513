"""Reading torch files of strangers: no code in them runs, and memory is taken only for bytes they have."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


class TensorFileError(ValueError):
    """What is wrong with a file of tensors, in one line."""


class ForeignObjectError(TensorFileError):
    """A torch file that holds objects of classes, which are not made here."""


#: What torch says, before the class's name, of an object that is no tensor and no plain value.
_FOREIGN = re.compile(
    r"Unsupported (?:global: GLOBAL|class) ([\w.]{1,100})|Trying to load unsupported GLOBAL ([\w.]{1,100})"
)


def read_torch_file(path: Path, mapped: bool = False) -> Any:
    """Tensors and plain values of a torch file, on the CPU.

    Args:
        path: the file.
        mapped: leave the values of a zip file on disk until they are used.

    Raises:
        OSError: it cannot be read.
        TensorFileError: it is no torch file, is damaged, holds more than tensors and plain values
            (`ForeignObjectError`), or is packed so that it would grow in memory (torch writes its zip files
            unpacked).
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise TensorFileError("it claims more bytes than it has")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
    except (OSError, TensorFileError):
        raise
    except pickle.UnpicklingError as error:
        if found := _FOREIGN.search(str(error)):
            name = found[1] or found[2]
            raise ForeignObjectError(
                f"it holds more than tensors and plain values (an object of {name})"
            ) from None
        raise TensorFileError(
            "not a torch file, or one that holds more than tensors and plain values"
        ) from None
    except Exception as error:  # torch's reader raises whatever a damaged pickle or zip leads to
        raise TensorFileError(f"damaged ({type(error).__name__})") from error

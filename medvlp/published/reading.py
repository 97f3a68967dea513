"""A file of published weights: named tensors, whose sizes are known before a value is read."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medvlp.tensor_files import ForeignObjectError, TensorFileError, read_torch_file
from shards.errors import MedvlpError

#: Keys that stand in messages and lists.
SHOWN = 5
_PREFIX = "module."  # of DataParallel and DDP


class PublishedFileError(MedvlpError):
    """A file is not the published checkpoint it is said to be; names what differs and what to do."""

    exit_code = 4


@dataclass(frozen=True)
class PublishedFile:
    """The weights of a file.

    Attributes:
        path: of the file. sha256: of its bytes, in hex.
        tensors: published key -> tensor, still on disk where the format allows it.
        others: names of what stands beside the weights (optimiser states, counters), which is not read.
    """

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    others: tuple[str, ...]


def read_published(path: Path, wrappers: Sequence[str]) -> PublishedFile:
    """Read a `.safetensors` file or a torch file of tensors and plain values.

    Args:
        path: the file.
        wrappers: keys under which the weights may stand, the likeliest first; without any of them the
            file's own keys are those of the weights. "module." before every key is taken off.

    Raises:
        PublishedFileError: no such file, no weights, damaged, or one that needs code to be read.
    """
    if not path.is_file():
        raise PublishedFileError(f"{path} is no file: give the path of a downloaded checkpoint")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path, mapped=True)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except ForeignObjectError as error:
        raise PublishedFileError(
            f"{path}: {error}. Code in it is never run. Where you trust it, keep its weights alone: "
            f"{_conversion(path, wrappers)}"
        ) from error
    except (SafetensorError, TensorFileError) as error:
        raise PublishedFileError(f"{path} cannot be read as weights: {error}; download it again") from error
    except OSError as error:
        raise PublishedFileError(f"{path} cannot be read ({error.strerror})") from error
    weights, others = _unwrapped(content, wrappers)
    if not weights:
        raise PublishedFileError(f"{path} holds no named tensors: is it another file?")
    _check_sizes(path, weights)
    return PublishedFile(path, sha256, _without_prefix(weights), others)


def _conversion(path: Path, wrappers: Sequence[str]) -> str:
    taken = f"x.get({wrappers[0]!r}, x)" if wrappers else "x"
    program = (
        f"import torch; x = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        f"torch.save(dict({taken}), 'weights.pth')"
    )
    # Quoted: a stranger chose the file's name, and the line is made to be pasted into a shell.
    return f"python -c {shlex.quote(program)}"


def _unwrapped(content: Any, wrappers: Sequence[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the weights, names of what stands beside them)."""
    if not isinstance(content, dict):
        return {}, ()
    for wrapper in wrappers:
        inner = content.get(wrapper)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            beside = [str(name) for name in content if name != wrapper]
            return _tensors(inner), (*beside, *_no_tensors(inner))
    return _tensors(content), _no_tensors(content)


def _tensors(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in values.items() if isinstance(value, Tensor)}


def _no_tensors(values: Mapping[Any, Any]) -> tuple[str, ...]:
    return tuple(str(name) for name, value in values.items() if not isinstance(value, Tensor))


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith(_PREFIX) for name in weights):
        return {name.removeprefix(_PREFIX): value for name, value in weights.items()}
    return weights


def _check_sizes(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse tensors that claim more values than the file has bytes for (strides of 0)."""
    size = path.stat().st_size
    for name, value in weights.items():
        if value.numel() * value.element_size() > size:
            raise PublishedFileError(
                f"{path} is damaged: {printable([name])} claims more bytes than the file has"
            )


def printable(names: Sequence[str]) -> str:
    """The first few names of a stranger's file for one line of a message."""
    shown = [repr(name[:100])[1:-1] for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

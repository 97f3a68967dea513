"""The optimiser's state in a checkpoint: by parameter name, for any layout that saved it or asks for it.

Every rank's `optimizer/rank-00000.safetensors` holds, for each parameter it had a part of, the tensors
`<key>:<name>`: a 1-D float32 part of `exp_avg`, `exp_avg_sq` or `momentum_buffer`, flattened, and `step` with
one element. The header's metadata `starts` says where each part begins in the flattened parameter. The fp32
master weights are whole, in `weights.safetensors`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from medvlp.runs.errors import CheckpointError
from shards.strict_json import parse_json

FOLDER = "optimizer"
#: Key of the number of updates a parameter has had.
STEP = "step"
#: Largest table of starts in a file's header, in bytes.
_LIMIT = 1 << 26


def file_name(rank: int) -> str:
    """Path of a rank's file inside a checkpoint."""
    return f"{FOLDER}/rank-{rank:05d}.safetensors"


def entry_name(key: str, parameter: str) -> str:
    """Name of a tensor in these files."""
    return f"{key}:{parameter}"


class _Part(NamedTuple):
    file: Any
    start: int
    stop: int


class OptimizerFiles:
    """All ranks' optimiser files of a checkpoint, read where asked.

    Args:
        checkpoint: its folder, verified.
        ranks: how many saved it.

    Raises:
        CheckpointError: one is missing or not of this format.
    """

    def __init__(self, checkpoint: Path, ranks: int):
        self._folder = checkpoint / FOLDER
        self._parts: dict[str, dict[str, list[_Part]]] = {}
        for rank in range(ranks):
            self._index(checkpoint / file_name(rank))

    def _index(self, path: Path) -> None:
        try:
            file: Any = safetensors.safe_open(path, framework="pt")
            starts = parse_json((file.metadata() or {})["starts"], _LIMIT)
            for entry in file.keys():  # noqa: SIM118  not a dict
                key, _, name = entry.partition(":")
                start, shape = int(starts[name]), file.get_slice(entry).get_shape()
                if key == STEP:
                    start = 0
                part = _Part(file, start, start + int(shape[0]))
                self._parts.setdefault(name, {}).setdefault(key, []).append(part)
        except (
            OSError,
            safetensors.SafetensorError,
            KeyError,
            ValueError,
            TypeError,
            IndexError,
            OverflowError,
        ) as error:
            raise CheckpointError(f"{path} cannot be read as optimiser state ({error})") from error

    def names(self) -> list[str]:
        """Parameters with state."""
        return list(self._parts)

    def keys(self, name: str) -> list[str]:
        """Kinds of state a parameter has, without `step`; none if the optimiser never updated it."""
        return [key for key in self._parts.get(name, {}) if key != STEP]

    def step(self, name: str) -> float | None:
        """Number of updates of a parameter, None where the optimiser does not count."""
        parts = self._parts.get(name, {}).get(STEP)
        return None if not parts else float(parts[0].file.get_tensor(entry_name(STEP, name))[0])

    def part(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened state `key` of a parameter, put together from all ranks.

        Raises:
            CheckpointError: the files do not hold all of it.
        """
        part = torch.empty(stop - start)
        found = 0
        for source in self._parts[name][key]:
            low, high = max(start, source.start), min(stop, source.stop)
            if low < high:
                piece = source.file.get_slice(entry_name(key, name))[low - source.start : high - source.start]
                part[low - start : high - start] = piece
                found += high - low
        if found != stop - start:
            raise CheckpointError(
                f"{self._folder} holds {found} of the {stop - start} elements of {key} of {name} asked for"
            )
        return part

"""A batch in one block of shared memory, on its way from a data worker to its rank.

`DataLoader` hands every tensor over by itself: a file, a mapping and a connection with a handshake for each
of nine.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medvlp.data.batch import Batch

#: Bytes at whose multiples tensors begin, as kernels like it.
_ALIGNMENT = 64


class _Place(NamedTuple):
    """Where in the block a tensor lies."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class PackedBatch:
    """A batch with places instead of tensors, and the block they are in.

    Attributes:
        shell: the batch. block: [bytes] uint8.
    """

    shell: Batch
    block: Tensor

    def pin_memory(self) -> "PackedBatch":
        """The same in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return PackedBatch(self.shell, self.block.pin_memory())

    def unpack(self) -> Batch:
        """The batch; its tensors are views of the block, which lives as long as one of them."""
        return self.shell._map(
            lambda place: self.block[place.start : place.end].view(place.dtype).view(place.shape), _Place
        )


def pack(batch: Batch) -> PackedBatch:
    """Copy a batch on the CPU into one block of shared memory."""
    tensors: list[tuple[_Place, Tensor]] = []
    end = 0

    def place(tensor: Tensor) -> _Place:
        nonlocal end
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.nbytes
        tensors.append((_Place(start, end, tensor.dtype, tuple(tensor.shape)), tensor))
        return tensors[-1][0]

    shell = batch._map(place)
    storage = torch.UntypedStorage._new_shared(max(1, end))  # type: ignore[no-untyped-call]
    block = torch.empty(0, dtype=torch.uint8).set_(storage)
    for where, tensor in tensors:
        block[where.start : where.end].copy_(tensor.reshape(-1).view(torch.uint8))
    return PackedBatch(shell, block)

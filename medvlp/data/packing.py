"""A batch in memory that a data worker and its rank share, on its way from the one to the other.

`DataLoader` hands every tensor over by itself: a file in /dev/shm (64 MB in all in many containers), a
mapping and a connection with a handshake for each of nine, and the system clears every page anew. Here the
memory is made once, before the workers are forked, and filled again and again.
"""

import itertools
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from medvlp.data.batch import Batch
from shards.errors import DataError

#: Bytes at whose multiples tensors begin, as kernels like it.
_ALIGNMENT = 64
#: Linux: memory is counted when it is written, not when it is mapped (`mmap` has no name for it before 3.12).
_NO_RESERVE = 0x4000


class _Place(NamedTuple):
    """Where in the memory a tensor lies."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Slot(NamedTuple):
    """Which memory: that of a `Slots`, of one of its workers, and the number of the batch that is in it."""

    slots: int
    worker: int
    batch: int


@dataclass
class PackedBatch:
    """A batch with places instead of tensors, and the memory they are in.

    Attributes:
        shell: the batch. size: bytes of its tensors.
        memory: [size] uint8, or the slot it is in.
    """

    shell: Batch
    size: int
    memory: Tensor | _Slot

    def _out_of_slot(self, slot: _Slot, copied: Callable[[Tensor], Tensor]) -> Tensor:
        """A copy of the bytes in a slot, where a batch of soon after will lie.

        Raises:
            RuntimeError: it lies there already.
        """
        number, memory = _all_slots[slot.slots].of(slot.worker, slot.batch)
        found = copied(memory[: self.size])
        if int(number) != slot.batch:  # the worker writes the number before the tensors
            raise RuntimeError(
                f"data worker {slot.worker} replaced batch {slot.batch} by {int(number)} before it was read: "
                "DataLoader asks for more batches in advance than data.prefetch says; please report it"
            )
        return found

    def pin_memory(self) -> "PackedBatch":
        """The same in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        if isinstance(self.memory, Tensor):
            return replace(self, memory=self.memory.pin_memory())
        return replace(self, memory=self._out_of_slot(self.memory, Tensor.pin_memory))

    def unpack(self) -> Batch:
        """The batch; its tensors are views of one block, which lives as long as one of them."""
        block = self.memory
        if not isinstance(block, Tensor):
            block = self._out_of_slot(block, Tensor.clone)
        return self.shell._map(
            lambda place: block[place.start : place.end].view(place.dtype).view(place.shape), _Place
        )


class Slots:
    """Memory for batches of the workers of one iteration; each worker fills its own slots in turn.

    They have to be made before the workers are forked, and closed after the last batch is unpacked.
    """

    def __init__(self, workers: int, ahead: int, size: int) -> None:
        """Memory that is never written costs none, so `size` may be generous.

        Args:
            workers: number of processes.
            ahead: batches that are asked of a worker while one of its batches is not yet taken.
            size: bytes of the largest batch that should go into a slot; larger ones travel by themselves.

        Raises:
            DataError: the system does not give the memory (a limit of the process, `ulimit -v`).
        """
        self.number = next(_numbers)
        self.size = _aligned(size)
        # Anonymous, so it is no file in /dev/shm, whose size containers bound.
        total = workers * (ahead + 1) * (_ALIGNMENT + self.size)
        try:
            memory = mmap.mmap(-1, total, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        except OSError as error:
            raise DataError(
                f"{total / 2**30:.1f} GiB of addresses for the batches of {workers} data workers: "
                f"{error.strerror}; lower data.workers, data.prefetch or the batch, or raise ulimit -v"
            ) from error
        self._memory = torch.frombuffer(memory, dtype=torch.uint8).view(workers, ahead + 1, -1)
        self._packed = 0
        _all_slots[self.number] = self

    def close(self) -> None:
        """Give the memory back."""
        del _all_slots[self.number]

    def of(self, worker: int, batch: int) -> tuple[Tensor, Tensor]:
        """The slot of a worker's batch: [] int64, number of the batch that is in it, and [size] uint8."""
        slot = self._memory[worker, batch % self._memory.shape[1]]
        return slot[:8].view(torch.int64)[0], slot[_ALIGNMENT:]

    def pack(self, batch: Batch, worker: int) -> PackedBatch:
        """Copy a batch on the CPU into the next slot of this worker (called by the worker itself)."""
        tensors: list[tuple[_Place, Tensor]] = []
        end = 0

        def place(tensor: Tensor) -> _Place:
            nonlocal end
            start = _aligned(end)
            end = start + tensor.nbytes
            tensors.append((_Place(start, end, tensor.dtype, tuple(tensor.shape)), tensor))
            return tensors[-1][0]

        shell = batch._map(place)
        if end <= self.size:
            number, memory = self.of(worker, self._packed)
            number.fill_(self._packed)
            packed = PackedBatch(shell, end, _Slot(self.number, worker, self._packed))
            self._packed += 1
        else:
            memory = torch.empty(end, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
            packed = PackedBatch(shell, end, memory)
        for where, tensor in tensors:
            memory[where.start : where.end].copy_(tensor.reshape(-1).view(torch.uint8))
        return packed


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


_numbers = itertools.count()
#: Those that are not closed: what a worker sends names its memory, it cannot hold it.
_all_slots: dict[int, Slots] = {}

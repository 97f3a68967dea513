"""The latest embeddings of a rank: a ring in its own memory, or in memory that a cluster worker
reads; filled from a GPU without waiting for it."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.errors import MedvlpError

#: Modalities by the number stored in the ring.
MODALITIES = ("image", "text")
#: First word of the header ("MEDVRING"), and the version of everything behind it.
MAGIC, FORMAT = int.from_bytes(b"MEDVRING", "little"), 1
#: How far the length of a row may be from 1: float16 rounds it by at most 2^-11.
LENGTH_TOLERANCE = 2e-3
#: Findings whose presence a row can remember; bit 63 is the sign.
LABEL_BITS = 63

#: Header words after magic and format. `begun` is raised before rows are overwritten, `written` after it.
_ROWS, _WIDTH, _BEGUN, _WRITTEN, _DROPPED, _WORDS = 2, 3, 4, 5, 6, 8
#: Arrays begin at multiples of a cache line.
_ALIGNMENT = 64


class RingError(MedvlpError, ValueError):
    """A buffer that holds no ring of this version."""


class BankRows(NamedTuple):
    """Rows of one rank or node, oldest first (of each ring).

    Attributes:
        embeddings: [n, D] float32, unit norm within float16's rounding.
        sample: [n] int64, position of the sample in the index of its split.
        modality: [n] uint8, place in `MODALITIES`.
        step: [n] int64, finished steps when the embedding was made.
        labels: [n] int64, bit c set: finding c of the index's label names is present; -1: nothing is known.
    """

    embeddings: Tensor
    sample: Tensor
    modality: Tensor
    step: Tensor
    labels: Tensor

    @classmethod
    def joined(cls, parts: list[BankRows]) -> BankRows:
        """The rows of several rings, in their order."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def label_bits(labels: Tensor) -> Tensor:
    """[B, C] labels of a batch (1 present, 0, -1 uncertain, NaN unknown) -> [B] int64 of `BankRows.labels`.

    Findings from number 63 on are left out.
    """
    labels = labels[:, :LABEL_BITS]
    weights = torch.ones_like(labels, dtype=torch.int64) << torch.arange(
        labels.shape[1], device=labels.device
    )
    bits = (weights * (labels == 1)).sum(1)
    return torch.where(labels.isnan().all(1), -1, bits)


class EmbeddingRing:
    """A bounded ring of float16 embeddings; the oldest are overwritten. One writer, any number of readers.

    Readers take no lock. The writer first raises `begun` to where it will end, then writes rows, then raises
    `written`: whatever a reader copied from behind `begun - rows` may be torn, and it drops that, also when
    the writer died half-way. Where the processor reorders stores (not on x86) a torn row can still show
    itself; its length is then hardly ever 1, and rows of another length are dropped and counted too.

    Args:
        rows: capacity; width: D.
        buffer: writable memory of at least `size(rows, width)` bytes, whose content is lost; None: its own.

    Attributes:
        torn: rows that `rows()` of this object has dropped because they were not of norm 1.
    """

    def __init__(self, rows: int, width: int, buffer: Any = None) -> None:
        self._map(bytearray(self.size(rows, width)) if buffer is None else buffer, rows, width)
        self._header[:] = 0
        self._header[[1, _ROWS, _WIDTH]] = FORMAT, rows, width
        self._header[0] = MAGIC  # last: a header that is complete

    @classmethod
    def attach(cls, buffer: Any) -> Self:
        """The ring that another process keeps in `buffer`.

        Raises:
            RingError: there is none of this format, or its sizes do not fit the buffer.
        """
        available = memoryview(buffer).nbytes
        if available < 8 * _WORDS:
            raise RingError(f"a buffer of {available} bytes is too short for the header of a ring")
        magic, version, rows, width = np.frombuffer(buffer, np.int64, 4).tolist()
        if (magic, version) != (MAGIC, FORMAT):
            raise RingError(f"the buffer holds no embedding ring of format {FORMAT}")
        if not (rows > 0 and width > 0 and cls.size(rows, width) <= available):
            raise RingError(f"a ring of {rows} rows of width {width} does not fit {available} bytes")
        ring = cls.__new__(cls)
        ring._map(buffer, rows, width)
        return ring

    @classmethod
    def size(cls, rows: int, width: int) -> int:
        """Bytes of a ring, for ever."""
        return _layout(rows, width)[-1]

    def _map(self, buffer: Any, rows: int, width: int) -> None:
        if rows < 1 or width < 1:
            raise RingError(f"a ring needs at least one row and one column, not {rows} and {width}")
        self._capacity, self.width, self.torn = rows, width, 0
        self._header: NDArray[np.int64] = np.frombuffer(buffer, np.int64, _WORDS)
        starts = _layout(rows, width)
        self._columns: dict[str, NDArray[Any]] = {
            name: np.frombuffer(buffer, kind, rows * (width if name == "embeddings" else 1), start)
            for (name, kind), start in zip(_COLUMNS.items(), starts, strict=False)
        }
        self._columns["embeddings"] = self._columns["embeddings"].reshape(rows, width)

    def __len__(self) -> int:
        return min(self.written, self._capacity)

    @property
    def written(self) -> int:
        """Rows written so far, the overwritten ones with them."""
        return int(self._header[_WRITTEN])

    @property
    def dropped(self) -> int:
        """Embeddings that were never written because they had no direction: NaN, infinite or zero."""
        return int(self._header[_DROPPED])

    def add(
        self, embeddings: Tensor, sample: Tensor, modality: str, step: int, labels: Tensor | None = None
    ) -> None:
        """Store the directions of embeddings; of more than the capacity the last ones. Tensors on the CPU.

        Args:
            embeddings: [B, D], any floating type; rows without a direction are dropped and counted.
            sample: [B] int64. modality: one of `MODALITIES`. step: finished steps.
            labels: [B] int64 of `label_bits`; None: nothing is known.
        """
        embeddings = embeddings.detach().float()
        lengths = torch.linalg.vector_norm(embeddings, dim=1)
        good = lengths.isfinite() & (lengths > torch.finfo(torch.float32).tiny)
        labels = torch.full_like(sample, -1) if labels is None else labels
        if not good.all():
            self._header[_DROPPED] += int((~good).sum())
            embeddings, lengths, sample, labels = (x[good] for x in (embeddings, lengths, sample, labels))
        values = {
            "embeddings": (embeddings / lengths[:, None]).to(torch.float16).numpy(),
            "sample": sample.numpy(),
            "modality": np.full(len(sample), MODALITIES.index(modality), np.uint8),
            "step": np.full(len(sample), step, np.int64),
            "labels": labels.numpy(),
        }
        self._write({name: value[-self._capacity :] for name, value in values.items()})

    def _write(self, values: dict[str, NDArray[Any]]) -> None:
        count, written = len(values["sample"]), self.written
        self._header[_BEGUN] = written + count
        first = written % self._capacity
        fits = min(count, self._capacity - first)
        for name, value in values.items():
            self._columns[name][first : first + fits] = value[:fits]
            self._columns[name][: count - fits] = value[fits:]
        self._header[_WRITTEN] = written + count

    def rows(self, until: int | None = None) -> BankRows:
        """A copy of the rows, oldest first, also while the writer goes on.

        Args:
            until: only rows written before the ring's `written` had this value.
        """
        end = self.written if until is None else min(until, self.written)
        start = max(0, end - self._capacity)
        slots = np.arange(start, end) % self._capacity
        copies = {name: column[slots] for name, column in self._columns.items()}
        # What the writer has begun to overwrite since is the oldest part of the copy.
        overwritten = max(0, int(self._header[_BEGUN]) - self._capacity - start)
        embeddings = torch.from_numpy(copies["embeddings"][overwritten:]).float()
        whole = (torch.linalg.vector_norm(embeddings, dim=1) - 1).abs() < LENGTH_TOLERANCE
        self.torn += len(whole) - int(whole.sum())
        others = [torch.from_numpy(copies[name][overwritten:])[whole] for name in list(_COLUMNS)[1:]]
        return BankRows(embeddings[whole], *others)

    def state_dict(self) -> dict[str, Any]:
        """Contents, for the checkpoint of this rank; views of the live memory."""
        columns = {name: torch.from_numpy(column) for name, column in self._columns.items()}
        return {**columns, "written": self.written, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over stored contents.

        Raises:
            ValueError: the capacity or width has changed.
        """
        own = tuple(self._columns["embeddings"].shape)
        if tuple(state["embeddings"].shape) != own:
            stored = tuple(state["embeddings"].shape)
            raise ValueError(f"the stored bank is {stored}, this run's is {own} (prototypes.bank_rows)")
        for name, column in self._columns.items():
            column[:] = state[name].numpy()
        self._header[[_BEGUN, _WRITTEN]] = state["written"]
        self._header[_DROPPED] = state["dropped"]


_COLUMNS: dict[str, Any] = {
    "embeddings": np.float16,
    "sample": np.int64,
    "modality": np.uint8,
    "step": np.int64,
    "labels": np.int64,
}


def _layout(rows: int, width: int) -> list[int]:
    """Where each column begins, and after the last one the size of the whole."""
    places = [8 * _WORDS]
    for name, kind in _COLUMNS.items():
        length = rows * np.dtype(kind).itemsize * (width if name == "embeddings" else 1)
        places.append(places[-1] + -(-length // _ALIGNMENT) * _ALIGNMENT)
    return places


#: Copies on their way before the oldest is waited for; one step makes two for each micro-batch.
LONGEST_QUEUE = 64


class _Copy(NamedTuple):
    arrived: Any  # a torch.cuda.Event
    embeddings: Tensor
    sample: Tensor
    modality: str
    step: int
    labels: Tensor | None


class StagedRing:
    """A ring that takes embeddings from any device.

    Those on the CPU are written at once. Those on a GPU are copied into pinned memory behind the step that
    made them and written at a later `add`, when the copy has arrived. (The GPU's part has not been run for
    lack of a machine with one.)

    Attributes:
        ring: what is written to.
    """

    def __init__(self, ring: EmbeddingRing) -> None:
        self.ring = ring
        self._queue: deque[_Copy] = deque()

    def add(
        self, embeddings: Tensor, sample: Tensor, modality: str, step: int, labels: Tensor | None
    ) -> None:
        """Store [B, D] embeddings with their [B] samples and labels, both on the CPU; see `EmbeddingRing`."""
        self.flush(wait=len(self._queue) >= LONGEST_QUEUE)
        if embeddings.device.type != "cuda":
            self.ring.add(embeddings, sample, modality, step, labels)
            return
        host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
        host.copy_(embeddings.detach(), non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(embeddings.device))
        self._queue.append(_Copy(arrived, host, sample, modality, step, labels))

    def flush(self, wait: bool = False) -> None:
        """Write what has arrived, oldest first; `wait`: all that is on its way."""
        while self._queue and (wait or self._queue[0].arrived.query()):
            copy = self._queue.popleft()
            if wait:
                copy.arrived.synchronize()
            self.ring.add(copy.embeddings, copy.sample, copy.modality, copy.step, copy.labels)

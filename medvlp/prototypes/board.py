"""The board of a node: nameless shared memory where its ranks and its cluster worker meet. No torch.

A board is a memfd: memory that belongs to the process that made it and that others open through
`/proc/<pid>/fd/<n>`. It has no name in /dev/shm, so that nothing is left of it when its users have ended, in
whatever way, and the limit of /dev/shm in a container does not hold for it.

Every word has one writer and is written after what it stands for: plan before state, table before answer,
cursor before request. Nobody waits for a lock, so nobody who dies can keep one.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import MedvlpError

#: Environment variable with the path of the node's board.
BOARD = "MEDVLP_BOARD"
#: First word of a board ("MEDVBORD"), and the version of everything behind it.
MAGIC, FORMAT = int.from_bytes(b"MEDVBORD", "little"), 1
#: State of a board: its plan is not there yet, is there, or there is nothing to do on this node.
WAITING, PLANNED, DECLINED = 0, 1, 2
#: What a worker says about a request: the table in the other slot is ready; too few rows; it did not work.
READY, PUT_OFF, FAILED = 1, 2, 3

_PAGE = 4096
_PLAN_BYTES, _TEXT_BYTES = 16 * _PAGE, 2 * _PAGE
#: Words of the first page, in cache lines of their own by writer: rank, worker, supervisor.
_STATE, _PLAN_LENGTH, _PLAN_SUM, _IN_USE, _ANCHORS = 2, 3, 4, 5, 6
_BEAT, _ANSWER, _OUTCOME = 16, 17, 18
_RESTARTS = 32
_TABLE_TENSORS = ("centroids", "counts", "log_bias", "temperatures")


class BoardError(MedvlpError, RuntimeError):
    """Memory that holds no board of this version, or a table that is not what its writer put there."""


@dataclass(frozen=True)
class Plan:
    """What a cluster worker needs to know, written by the first rank of its node.

    Attributes:
        node, nodes: which of how many. store: "host:port" where the workers meet; "" with one node.
        ranks: of this node. rows, width: of each rank's ring. clusters: K.
        seed: of k-means. ring_bytes: of one ring. config: the `prototypes` section.
    """

    node: int
    nodes: int
    store: str
    ranks: int
    rows: int
    width: int
    clusters: int
    seed: int
    ring_bytes: int
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        sizes = (self.nodes, self.ranks, self.rows, self.width, self.clusters, self.ring_bytes)
        if not (min(sizes) > 0 and 0 <= self.node < self.nodes):
            raise BoardError(f"a plan for node {self.node} with the sizes {sizes} cannot be")


@dataclass(frozen=True)
class StoredTable:
    """A slot's content: the state of a `PrototypeTable` with numpy arrays, and what its refresh reported."""

    state: dict[str, Any]
    fingerprint: int
    figures: dict[str, float]


def new_board() -> tuple[int, str]:
    """A board without a plan: its file descriptor, which keeps it alive, and the path others open."""
    descriptor = os.memfd_create("medvlp-board")
    os.ftruncate(descriptor, _PAGE)
    words = np.frombuffer(mmap.mmap(descriptor, _PAGE), np.int64)
    words[_IN_USE], words[1], words[0] = -1, FORMAT, MAGIC
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


class Board:
    """A view of a node's board.

    Args:
        path: what `new_board` returned.

    Attributes:
        plan: None until the first rank has written it (`refresh_plan` looks).

    Raises:
        BoardError: there is no board, or one of another version.
    """

    def __init__(self, path: str):
        self.path = path
        self.plan: Plan | None = None
        try:
            self._words = np.frombuffer(self._map(_PAGE), np.int64)
        except (OSError, ValueError) as error:
            raise BoardError(f"cannot open the board {path} of this node ({error})") from error
        if self._words[:2].tolist() != [MAGIC, FORMAT]:
            raise BoardError(
                f"{path} is no board of format {FORMAT}; medvlp's own processes differ in version"
            )

    def _map(self, size: int) -> mmap.mmap:
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    @property
    def state(self) -> int:
        """`WAITING`, `PLANNED` or `DECLINED`."""
        return int(self._words[_STATE])

    def decline(self) -> None:
        """Tell the worker that this run has nothing for it to do."""
        self._words[_STATE] = DECLINED

    def publish(self, plan: Plan) -> None:
        """Size the board for a plan and write it; the node's first rank does this, once."""
        text = json.dumps(asdict(plan)).encode()
        if len(text) > _PLAN_BYTES:
            raise BoardError(f"a plan of {len(text)} bytes is too long (prototypes.anchors?)")
        os.truncate(self.path, _places(plan)[-1])
        memory = self._map(_PAGE + _PLAN_BYTES)
        memory[_PAGE : _PAGE + len(text)] = text
        self._words[_PLAN_LENGTH], self._words[_PLAN_SUM] = len(text), zlib.crc32(text)
        self._words[_STATE] = PLANNED
        self.refresh_plan()

    def refresh_plan(self) -> Plan | None:
        """Read the plan once it is there.

        Raises:
            BoardError: it is damaged, or the memory is smaller than it says.
        """
        if self.plan is not None or self.state != PLANNED:
            return self.plan
        length = int(self._words[_PLAN_LENGTH])
        size = Path(self.path).stat().st_size
        text = self._map(size)[_PAGE : _PAGE + length] if 0 < length <= _PLAN_BYTES < size else b""
        if not text or zlib.crc32(text) != self._words[_PLAN_SUM]:
            raise BoardError(f"the plan on the board {self.path} is damaged")
        plan = Plan(**json.loads(text))
        if _places(plan)[-1] > size:
            raise BoardError(f"the board {self.path} has {size} bytes, less than its plan needs")
        self._memory = memoryview(self._map(size))
        requests, anchors, slots, rings, _ = _places(plan)
        self._requests = self._array(requests, np.int64, (plan.ranks, 2))
        self._anchors = self._array(anchors, np.float32, (plan.clusters, plan.width))
        slot_bytes = _slot_bytes(plan)
        self._slots = [_Slot(self._part(slots + i * slot_bytes, slot_bytes), plan) for i in range(2)]
        self._rings = [self._part(rings + i * plan.ring_bytes, plan.ring_bytes) for i in range(plan.ranks)]
        self.plan = plan
        return plan

    def _part(self, start: int, length: int) -> memoryview:
        return self._memory[start : start + length]

    def _array(self, start: int, kind: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        return np.frombuffer(self._memory, kind, int(np.prod(shape)), start).reshape(shape)

    def ring_memory(self, local_rank: int) -> memoryview:
        """The memory of a rank's `EmbeddingRing`."""
        return self._rings[local_rank]

    # --- what ranks write

    def use(self, slot: int) -> None:
        """The table in this slot is the one the ranks assign with; a refresh starts from it."""
        self._words[_IN_USE] = slot

    def put(self, state: Mapping[str, Any], fingerprint: int) -> None:
        """Write a table that did not come from the worker (of a checkpoint) and use it."""
        self._slots[0].write(state, fingerprint, {})
        self.use(0)

    def set_anchors(self, anchors: NDArray[np.float32] | None) -> None:
        """The anchors of the next request, [A, D] with at most K rows; before it, by the first rank."""
        count = 0 if anchors is None else len(anchors)
        if count:
            self._anchors[:count] = anchors
        self._words[_ANCHORS] = count

    def request(self, local_rank: int, number: int, cursor: int) -> None:
        """Ask for a refresh of the rows this rank had written when its ring stood at `cursor`.

        Numbers are positive and rise; a refresh begins when all ranks of all nodes have asked for it.
        """
        self._requests[local_rank, 1] = cursor
        self._requests[local_rank, 0] = number

    # --- what the worker writes

    def beat(self, nanoseconds: int) -> None:
        """The worker lives at this time of the machine's monotonic clock."""
        self._words[_BEAT] = nanoseconds

    def answer(self, number: int, outcome: int) -> None:
        """Say what came of a request; a table that is `READY` must be in the slot that is not in use."""
        self._words[_OUTCOME] = outcome
        self._words[_ANSWER] = number

    def write_table(self, state: Mapping[str, Any], fingerprint: int, figures: Mapping[str, float]) -> None:
        """Write a new table into the slot that is not in use."""
        self._slots[self.other_slot].write(state, fingerprint, figures)

    # --- what all read

    @property
    def in_use(self) -> int | None:
        """Slot of the table in use; None before there is one."""
        slot = int(self._words[_IN_USE])
        return slot if slot in (0, 1) else None

    @property
    def other_slot(self) -> int:
        """The slot a worker writes to."""
        return 1 if self.in_use == 0 else 0

    def table(self, slot: int) -> StoredTable:
        """A copy of a slot's table.

        Raises:
            BoardError: its checksum is wrong.
        """
        return self._slots[slot].read()

    def anchors(self) -> NDArray[np.float32] | None:
        """A copy of the anchors of the present request."""
        count = min(int(self._words[_ANCHORS]), len(self._anchors))
        return self._anchors[:count].copy() if count > 0 else None

    def requests(self) -> tuple[list[int], list[int]]:
        """Latest request of each rank, and the cursors that belong to them."""
        numbers = self._requests[:, 0].tolist()
        return numbers, self._requests[:, 1].tolist()

    def answered(self) -> tuple[int, int]:
        """Number of the latest request with an answer (0: none), and the outcome."""
        number = int(self._words[_ANSWER])
        return number, int(self._words[_OUTCOME])

    @property
    def last_beat(self) -> int:
        """Time of the worker's latest `beat`; 0 before the first."""
        return int(self._words[_BEAT])

    @property
    def restarts(self) -> int:
        """How often the worker has been started again."""
        return int(self._words[_RESTARTS])

    @restarts.setter
    def restarts(self, number: int) -> None:
        self._words[_RESTARTS] = number


class _Slot:
    """Memory of one table: lengths and sums, a JSON text of what is not an array, arrays."""

    def __init__(self, memory: memoryview, plan: Plan):
        self._memory = memory
        self._words = np.frombuffer(memory, np.int64, 8)
        shape = (plan.clusters, plan.width)
        shapes = {name: shape if name == "centroids" else shape[:1] for name in _TABLE_TENSORS}
        self._arrays: dict[str, NDArray[np.float32]] = {}
        start = 64 + _TEXT_BYTES
        for name, each in shapes.items():
            count = int(np.prod(each))
            self._arrays[name] = np.frombuffer(memory, np.float32, count, start).reshape(each)
            start += 4 * count

    def write(self, state: Mapping[str, Any], fingerprint: int, figures: Mapping[str, float]) -> None:
        rest = {name: value for name, value in state.items() if name not in _TABLE_TENSORS}
        text = json.dumps([rest, dict(figures)]).encode()
        if len(text) > _TEXT_BYTES:
            raise BoardError(f"figures of {len(text)} bytes do not fit a board")
        for name, array in self._arrays.items():
            array[:] = np.asarray(state[name])
        self._memory[64 : 64 + len(text)] = text
        self._words[:2] = len(text), fingerprint
        self._words[2] = self._sum()

    def read(self) -> StoredTable:
        if self._words[2] != self._sum():
            raise BoardError("the table on this node's board is damaged")
        length, fingerprint = self._words[:2].tolist()
        rest, figures = json.loads(bytes(self._memory[64 : 64 + length]))
        arrays = {name: array.copy() for name, array in self._arrays.items()}
        return StoredTable(arrays | rest, fingerprint, figures)

    def _sum(self) -> int:
        length = min(max(0, int(self._words[0])), _TEXT_BYTES)
        total = zlib.crc32(self._words[:2].tobytes())
        total = zlib.crc32(self._memory[64 : 64 + length], total)
        return zlib.crc32(self._memory[64 + _TEXT_BYTES :], total)


def _slot_bytes(plan: Plan) -> int:
    arrays = 4 * plan.clusters * (plan.width + len(_TABLE_TENSORS) - 1)
    return _whole_pages(64 + _TEXT_BYTES + arrays)


def _places(plan: Plan) -> list[int]:
    """Where requests, anchors, slots and rings begin, and the size of the whole."""
    requests = _PAGE + _PLAN_BYTES
    anchors = requests + _whole_pages(16 * plan.ranks)
    slots = anchors + _whole_pages(4 * plan.clusters * plan.width)
    rings = slots + 2 * _slot_bytes(plan)
    return [requests, anchors, slots, rings, rings + plan.ranks * plan.ring_bytes]


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE

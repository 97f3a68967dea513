"""The board of a node: nameless shared memory where its ranks and its cluster worker meet. No torch.

A board is a memfd: memory that belongs to the process that made it and that others open through
`/proc/<pid>/fd/<n>`. It has no name in /dev/shm, so that nothing is left of it when its users have ended, in
whatever way, and the limit of /dev/shm in a container does not hold for it.

Every word has one writer and is written after what it stands for: settings before state, table before answer,
cursor before request. Nobody waits for a lock, so nobody who dies can keep one.
"""

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
MAGIC, FORMAT = int.from_bytes(b"MEDVBORD", "little"), 2
#: State of a board: the settings are not there yet, are there, or the worker has nothing to do on this node.
WAITING, CONFIGURED, DECLINED = 0, 1, 2
#: What a worker says about a request: the table in the other slot is ready; too few rows; it did not work.
READY, PUT_OFF, FAILED = 1, 2, 3

_PAGE = 4096
_SETTINGS_BYTES, _TEXT_BYTES = 16 * _PAGE, 2 * _PAGE
#: Words of the first page, in cache lines of their own by writer: rank, worker, supervisor.
_STATE, _SETTINGS_LENGTH, _SETTINGS_SUM, _IN_USE, _ANCHORS = 2, 3, 4, 5, 6
_HEARTBEAT, _ANSWER, _OUTCOME, _STARTED = 16, 17, 18, 19
_RESTARTS = 32
_TABLE_TENSORS = ("centroids", "counts", "log_bias", "temperatures")


class BoardError(MedvlpError, RuntimeError):
    """Memory that holds no board of this version, or a table that is not what its writer put there."""


@dataclass(frozen=True)
class WorkerSettings:
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
            raise BoardError(f"settings for node {self.node} with the sizes {sizes} cannot be")


@dataclass(frozen=True)
class StoredTable:
    """A slot's content: the state of a `PrototypeTable` with numpy arrays, and what its refresh reported."""

    state: dict[str, Any]
    fingerprint: int
    metrics: dict[str, float]


def new_board() -> tuple[int, str]:
    """A board without settings: its file descriptor, which keeps it alive, and the path others open."""
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
        settings: None until the first rank has written them (`read_settings` looks).

    Raises:
        BoardError: there is no board, or one of another version.
    """

    def __init__(self, path: str):
        self.path = path
        self.settings: WorkerSettings | None = None
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
        """`WAITING`, `CONFIGURED` or `DECLINED`."""
        return int(self._words[_STATE])

    def decline(self) -> None:
        """Tell the worker that this run has nothing for it to do."""
        self._words[_STATE] = DECLINED

    def publish(self, settings: WorkerSettings) -> None:
        """Size the board for the worker's settings and write them; the node's first rank does this, once."""
        text = json.dumps(asdict(settings)).encode()
        if len(text) > _SETTINGS_BYTES:
            raise BoardError(f"settings of {len(text)} bytes are too long (prototypes.anchors?)")
        os.truncate(self.path, _places(settings)[-1])
        memory = self._map(_PAGE + _SETTINGS_BYTES)
        memory[_PAGE : _PAGE + len(text)] = text
        self._words[_SETTINGS_LENGTH], self._words[_SETTINGS_SUM] = len(text), zlib.crc32(text)
        self._words[_STATE] = CONFIGURED
        self.read_settings()

    def read_settings(self) -> WorkerSettings | None:
        """Read the settings once they are there.

        Raises:
            BoardError: they are damaged, or the memory is smaller than they say.
        """
        if self.settings is not None or self.state != CONFIGURED:
            return self.settings
        length = int(self._words[_SETTINGS_LENGTH])
        size = Path(self.path).stat().st_size
        text = self._map(size)[_PAGE : _PAGE + length] if 0 < length <= _SETTINGS_BYTES < size else b""
        if not text or zlib.crc32(text) != self._words[_SETTINGS_SUM]:
            raise BoardError(f"the settings on the board {self.path} are damaged")
        settings = WorkerSettings(**json.loads(text))
        if _places(settings)[-1] > size:
            raise BoardError(f"the board {self.path} has {size} bytes, less than its settings need")
        self._memory = memoryview(self._map(size))
        requests, anchors, slots, rings, _ = _places(settings)
        self._requests = self._array(requests, np.int64, (settings.ranks, 2))
        self._anchors = self._array(anchors, np.float32, (settings.clusters, settings.width))
        slot_bytes = _slot_bytes(settings)
        self._slots = [_Slot(self._part(slots + i * slot_bytes, slot_bytes), settings) for i in range(2)]
        self._rings = [
            self._part(rings + i * settings.ring_bytes, settings.ring_bytes) for i in range(settings.ranks)
        ]
        self.settings = settings
        return settings

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

    def heartbeat(self, nanoseconds: int) -> None:
        """The worker lives at this time of the machine's monotonic clock."""
        self._words[_HEARTBEAT] = nanoseconds

    def start_is_over(self) -> None:
        """This process, the worker, has imported all it works with."""
        self._words[_STARTED] = os.getpid()

    def answer(self, number: int, outcome: int) -> None:
        """Say what came of a request; a table that is `READY` must be in the slot that is not in use."""
        self._words[_OUTCOME] = outcome
        self._words[_ANSWER] = number

    def write_table(self, state: Mapping[str, Any], fingerprint: int, metrics: Mapping[str, float]) -> None:
        """Write a new table into the slot that is not in use."""
        self._slots[self.other_slot].write(state, fingerprint, metrics)

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
    def last_heartbeat(self) -> int:
        """Time of the worker's latest `heartbeat`; 0 before the first."""
        return int(self._words[_HEARTBEAT])

    @property
    def started_worker(self) -> int:
        """Process id of the latest worker whose start is over; 0 before the first."""
        return int(self._words[_STARTED])

    @property
    def restarts(self) -> int:
        """How often the worker has been started again."""
        return int(self._words[_RESTARTS])

    @restarts.setter
    def restarts(self, number: int) -> None:
        self._words[_RESTARTS] = number


class _Slot:
    """Memory of one table: lengths and sums, a JSON text of what is not an array, arrays."""

    def __init__(self, memory: memoryview, settings: WorkerSettings):
        self._memory = memory
        self._words = np.frombuffer(memory, np.int64, 8)
        shape = (settings.clusters, settings.width)
        shapes = {name: shape if name == "centroids" else shape[:1] for name in _TABLE_TENSORS}
        self._arrays: dict[str, NDArray[np.float32]] = {}
        start = 64 + _TEXT_BYTES
        for name, each in shapes.items():
            count = int(np.prod(each))
            self._arrays[name] = np.frombuffer(memory, np.float32, count, start).reshape(each)
            start += 4 * count

    def write(self, state: Mapping[str, Any], fingerprint: int, metrics: Mapping[str, float]) -> None:
        rest = {name: value for name, value in state.items() if name not in _TABLE_TENSORS}
        text = json.dumps([rest, dict(metrics)]).encode()
        if len(text) > _TEXT_BYTES:
            raise BoardError(f"metrics of {len(text)} bytes do not fit a board")
        for name, array in self._arrays.items():
            array[:] = np.asarray(state[name])
        self._memory[64 : 64 + len(text)] = text
        self._words[:2] = len(text), fingerprint
        self._words[2] = self._sum()

    def read(self) -> StoredTable:
        if self._words[2] != self._sum():
            raise BoardError("the table on this node's board is damaged")
        length, fingerprint = self._words[:2].tolist()
        rest, metrics = json.loads(bytes(self._memory[64 : 64 + length]))
        arrays = {name: array.copy() for name, array in self._arrays.items()}
        return StoredTable(arrays | rest, fingerprint, metrics)

    def _sum(self) -> int:
        length = min(max(0, int(self._words[0])), _TEXT_BYTES)
        total = zlib.crc32(self._words[:2].tobytes())
        total = zlib.crc32(self._memory[64 : 64 + length], total)
        return zlib.crc32(self._memory[64 + _TEXT_BYTES :], total)


def _slot_bytes(settings: WorkerSettings) -> int:
    arrays = 4 * settings.clusters * (settings.width + len(_TABLE_TENSORS) - 1)
    return _whole_pages(64 + _TEXT_BYTES + arrays)


def _places(settings: WorkerSettings) -> list[int]:
    """Where requests, anchors, slots and rings begin, and the size of the whole."""
    requests = _PAGE + _SETTINGS_BYTES
    anchors = requests + _whole_pages(16 * settings.ranks)
    slots = anchors + _whole_pages(4 * settings.clusters * settings.width)
    rings = slots + 2 * _slot_bytes(settings)
    return [requests, anchors, slots, rings, rings + settings.ranks * settings.ring_bytes]


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE

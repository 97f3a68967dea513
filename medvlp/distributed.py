"""The only file that names `torch.distributed`. Every function is right at world size 1 (no group at all).

Two groups exist in a run: the default one (NCCL on CUDA, gloo on CPU) carries gradients and everything a
loss needs; the *bookkeeping* group (always gloo) carries metrics, stop flags and checkpoint commits, so that
these never queue behind, or wait for, work on the GPU.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

from medvlp.device import choose_device
from medvlp.network import tell_gloo
from medvlp.ranks import LostPeerError, Ranks, detect, tell_deepspeed

#: How long a collective may wait for another rank before the run is declared dead.
TIMEOUT = timedelta(minutes=30)

_TORCH = Version(torch.__version__).release
# torch 2.14 renamed them and warns about the old names; older versions have only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _set_timeout(limit: timedelta, group: Any) -> None:
    """`dist.set_timeout`, which torch has since 2.14; before, only under a private name."""
    (getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout)(limit, group)


#: What gloo and NCCL say when the process at the other end is gone.
_LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
    "Timed out waiting",
)  # fmt: skip

#: How many seconds longer than asked a collective waits: after that NCCL's own watchdog aborts the process,
#: which then cannot say whom it waited for.
_SPARE_SECONDS = 120.0

#: The ranks did not all meet in time (`dist.DistNetworkError`: the place where they meet is not there).
RendezvousError = (dist.DistStoreError, dist.DistNetworkError)

_bookkeeping: Any = None
_owns_default_group = False


def initialize(ranks: Ranks | None = None, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the process group that the launcher describes and return this rank's device.

    A default group that already exists is kept (and left alive by `shutdown`). Without a launcher a group
    of one process is made, which DeepSpeed needs.

    Args:
        ranks: place of this process; default: read from the environment.
        timeout: how long joining, and any collective, may wait for another rank (see `set_timeout`).
    """
    global _bookkeeping, _owns_default_group
    ranks = ranks or detect()
    device = choose_device(ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tell_deepspeed(ranks, device.index)
    tell_gloo(ranks)
    if not is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if ranks.world_size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(
                backend,
                init_method=f"tcp://{ranks.address}:{ranks.port}" if ranks.launcher == "srun" else "env://",
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timeout,
                # In torch 2.7.0 NCCL's collectives hang at random with it (its issue 153960).
                device_id=device if device.type == "cuda" and _TORCH != (2, 7, 0) else None,
            )
        _owns_default_group = True
    if _bookkeeping is None:
        _bookkeeping = dist.new_group(backend="gloo", timeout=timeout)
    return device


def write_flight_record(folder: Path) -> None:
    """Write what NCCL, if used, remembers of its last collectives to `flight-<rank>`; may raise OSError."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and is_initialized() and dist.get_backend() == "nccl":
        (folder / f"flight-{rank()}").write_bytes(dump())


def set_timeout(seconds: float | None) -> None:
    """How long a collective of any group may wait from now on; None: as long as `TIMEOUT`.

    In truth two minutes longer, so that who looks at the clock (the training loop's watchdog) can say first
    which rank is missing.
    """
    limit = TIMEOUT if seconds is None else timedelta(seconds=seconds + _SPARE_SECONDS)
    for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed's groups too; no public list of them
        _set_timeout(limit, group)


def shared_store() -> Any:
    """The store the ranks met in, as their launchers know it: without the prefix of torch's own keys.

    On a connection of its own, so that nobody waits for who waits in it.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    # Not `clone`, which is new in torch 2.8.
    of_other_process = isinstance(store, dist.TCPStore)  # type: ignore[attr-defined]
    return connect_store(store.host, store.port, store.timeout) if of_other_process else store


def host_store() -> Any:
    """A store that this process serves on a free `port` to whoever can reach this machine."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def connect_store(address: str, port: int, timeout: timedelta) -> Any:
    """The store that another process serves; `timeout` is that of connecting and of every call.

    Raises:
        RuntimeError: it does not answer.
    """
    return dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]


@contextmanager
def temporary_group(store: Any, rank: int, world_size: int, timeout: timedelta) -> Iterator[None]:
    """Make the processes that meet in `store` the default gloo group of a block, in processes without one.

    What goes wrong in it leaves nothing behind: the next block forms a new group, in a new store.

    Raises:
        RuntimeError: this process has a group already, or the processes did not meet in time.
    """
    if is_initialized():
        raise RuntimeError("this process has a process group already; a temporary one would take its place")
    # Torch names a group in its store by a count that it takes back when a group is destroyed, but not when
    # one could not be formed: such a process would look for the others under another name for ever.
    dist.distributed_c10d._world.group_count = 0
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        yield
    finally:
        if dist.is_initialized():  # also when not all came to the barrier at the end of the above
            dist.destroy_process_group()


def shutdown(graceful: bool = True) -> None:
    """Leave the groups that `initialize` made; `graceful` waits for all ranks first (not after an error).

    A group of one process stays: DeepSpeed remembers the first group it saw and trains in no other.
    """
    global _bookkeeping, _owns_default_group
    if world_size() == 1:
        return
    if graceful:
        barrier()
    if _owns_default_group:
        dist.destroy_process_group()
        _bookkeeping = None
    _owns_default_group = False


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error follows from the end of another rank (gloo and NCCL tell it in words only)."""
    while error is not None:
        if isinstance(error, LostPeerError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER):
            return True
        error = error.__cause__
    return False


def is_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


#: Of a thread, because the checkpoint's works beside the training's.
_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, every function here is as at world size 1, in this thread: losses see this rank's batch only.

    DeepSpeed's own collectives (ZeRO-3 gathers weights) go on, so all ranks still make equally many passes.
    """
    before = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(before)


def rank() -> int:
    """Rank of this process, 0 without a group."""
    return dist.get_rank() if is_initialized() and not _is_alone.get() else 0


def world_size() -> int:
    """Number of ranks, 1 without a group."""
    return dist.get_world_size() if is_initialized() and not _is_alone.get() else 1


def local_rank() -> int:
    """Number of this rank's GPU on a GPU, else its rank on this node as the launcher says it, else 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


class _GatherRows(torch.autograd.Function):
    """Concatenate every rank's rows; the backward pass sums each row's gradients from all ranks.

    Hand-written because `torch.distributed.nn.functional.all_gather` is deprecated and the functional
    collectives' autograd forms are private.
    """

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        context.rows = tensor.shape[0]
        output = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(output, tensor.contiguous())
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((context.rows, *gradient.shape[1:]))
        _reduce_scatter(own, gradient.contiguous())
        return own


class _ReduceSum(torch.autograd.Function):
    """Sum over ranks; the backward pass sums the gradients over ranks."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        output = tensor.clone()
        dist.all_reduce(output)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """[B, ...] on every rank (equal shapes) -> [ranks * B, ...] in rank order, with exact gradients.

    With losses averaged over local rows and gradients averaged over ranks (as DeepSpeed does), the result
    equals the single-process gradient on the concatenated batch.
    """
    return _GatherRows.apply(tensor) if world_size() > 1 else tensor


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over ranks, differentiable."""
    return _ReduceSum.apply(tensor) if world_size() > 1 else tensor


@torch.no_grad()
def gather_rows(tensor: Tensor) -> Tensor:
    """[B, ...] on every rank (equal shapes) -> [ranks * B, ...] in rank order, without gradient."""
    tensor = tensor.detach().contiguous()
    if world_size() == 1:
        return tensor
    output = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    _all_gather(output, tensor)
    return output


def logsumexp_over_ranks(tensor: Tensor) -> Tensor:
    """Element-wise log of the sum over ranks of exp(tensor), without gradient and without overflow."""
    largest = maximum_over_ranks(tensor)
    shift = largest.where(largest.isfinite(), 0)
    return sum_over_ranks((tensor.detach() - shift).exp()).log() + shift


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over ranks without gradient, as a new tensor."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def sum_on_host(tensor: Tensor) -> Tensor:
    """Sum over ranks of a CPU tensor, as a new tensor, through the bookkeeping group."""
    return _reduced(tensor, dist.ReduceOp.SUM, _bookkeeping)


@torch.no_grad()
def gather_on_host(tensor: Tensor) -> Tensor:
    """[n, ...] CPU tensors, n of each rank's own and perhaps 0 -> [N, ...] in rank order, on every rank.

    Through the bookkeeping group; ranks send as many rows as the one that has most.
    """
    if world_size() == 1:
        return tensor.detach().clone()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([tensor.shape[0]]), group=_bookkeeping)
    padded = tensor.new_zeros((max(int(count) for count in counts), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor.detach()
    buffers = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(buffers, padded, group=_bookkeeping)
    return torch.cat([buffer[: int(count)] for buffer, count in zip(buffers, counts, strict=True)])


@torch.no_grad()
def broadcast_on_host(tensor: Tensor) -> Tensor:
    """Rank 0's CPU tensor on every rank (in place, returned), through the bookkeeping group."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0, group=_bookkeeping)
    return tensor


def maximum_over_ranks(tensor: Tensor) -> Tensor:
    """Element-wise maximum over ranks without gradient, as a new tensor."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def barrier() -> None:
    """Wait until every rank is here (bookkeeping group)."""
    if world_size() > 1:
        dist.barrier(group=_bookkeeping)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's JSON-serialisable value, in rank order, on every rank.

    JSON instead of torch's object collectives, which unpickle what other processes send.
    """
    line = bytearray(json.dumps(value).encode() + b"\n")  # JSON of one line: what is in texts is escaped
    lines = gather_on_host(torch.frombuffer(line, dtype=torch.uint8))
    return [json.loads(each) for each in bytes(lines.numpy()).splitlines()]


def broadcast_object(value: Any) -> Any:
    """Rank 0's JSON-serialisable value on every rank."""
    return gather_objects(value if is_main() else None)[0]


def mean_over_ranks(values: list[float]) -> list[float]:
    """Mean of each number over ranks (bookkeeping group; every rank gives the same number of values)."""
    total = _reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM, _bookkeeping)
    return [float(number) for number in total / world_size()]


def greatest_over_ranks(values: list[float]) -> list[float]:
    """Maximum of each number over ranks (bookkeeping group)."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return [float(number) for number in _reduced(numbers, dist.ReduceOp.MAX, _bookkeeping)]


def greatest_integers_later(values: list[int]) -> Callable[[], list[int]]:
    """Maximum of each 64-bit integer over ranks (bookkeeping group), exactly, by a thread of the group's.

    Returns:
        What waits for the other ranks, and gives the maxima.
    """
    numbers = torch.tensor(values, dtype=torch.int64)
    work = (
        dist.all_reduce(numbers, dist.ReduceOp.MAX, _bookkeeping, async_op=True) if world_size() > 1 else None
    )

    def result() -> list[int]:
        if work is not None:
            work.wait()
        return numbers.tolist()

    return result


@torch.no_grad()
def _reduced(tensor: Tensor, operation: Any, group: Any = None) -> Tensor:
    output = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(output, op=operation, group=group)
    return output

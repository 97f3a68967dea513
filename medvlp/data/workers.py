"""Batches from a dataset, read by worker processes or by the rank itself, and how these processes end."""

import gc
import multiprocessing
import os
import re
import signal
import traceback
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from medvlp.config import DataConfig
from medvlp.data.batch import Batch
from medvlp.data.dataset import ImageReportDataset
from medvlp.data.packing import PackedBatch, Slots
from medvlp.device import uses_cuda
from shards.errors import DataError

#: Seconds to wait for a killed data worker; only one that waits for a dead disk takes longer.
_KILL_SECONDS = 2.0
#: Of all loaders that run, with their number in their loader; the process objects keep how they ended.
_workers: list[tuple[int, BaseProcess]] = []


class LoaderError(DataError):
    """The loader cannot go on: one of its processes died, or an error nobody foresaw arose while it read."""


class WorkerLoader:
    """The batches of a dataset, one for each request.

    Args:
        requests: one for each batch. config: the `data` section.
        workers: processes that read; 0: this one does. rows: samples of the largest batch.

    Attributes:
        dataset: what reads a request.
    """

    def __init__(
        self,
        dataset: ImageReportDataset,
        requests: Sampler[Any] | list[list[int]],
        config: DataConfig,
        workers: int,
        rows: int,
    ) -> None:
        # What a batch seldom exceeds: images, texts, and some fields of an image's size.
        self._slot_size = (1 << 20) + rows * (4 * config.image_size**2 + 64 * config.max_tokens + 4096)
        self.dataset = dataset
        self._packing = _ErrorsAsValues(dataset)
        self._loader: DataLoader[Any] = DataLoader(
            self._packing,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            pin_memory=uses_cuda(),  # not where a GPU is only present: pinning makes a CUDA context on it
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if workers else None,  # Python 3.14 would start them from pickles
            # Else the loader would advance the default generator, which the checkpoint restores.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        """Number of requests."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches.

        Raises:
            DataError: what the dataset raised, or `LoaderError` for an error nobody foresaw.
        """
        slots = self._packing.slots = self._slots()
        before = set(multiprocessing.active_children())
        batches = iter(self._loader)
        started = [child for child in multiprocessing.active_children() if child not in before]
        started.sort(key=lambda child: [int(number) for number in re.findall(r"\d+", child.name)])
        _workers[:] = [(number, worker) for number, worker in _workers if worker.exitcode is None]
        _workers.extend(enumerate(started))
        try:
            for batch in batches:
                if isinstance(batch, DataError):
                    raise batch
                yield batch.unpack() if isinstance(batch, PackedBatch) else batch
        finally:
            if slots is not None:
                slots.close()

    def _slots(self) -> Slots | None:
        """Of one iteration, before its workers are forked: iterations may overlap."""
        workers, ahead = self._loader.num_workers, self._loader.prefetch_factor
        return Slots(workers, ahead, self._slot_size) if workers and ahead else None


class _ErrorsAsValues(Dataset[Batch | PackedBatch | DataError]):
    """The dataset, returning errors: `DataLoader` would wrap a raised one in the worker's traceback.

    Attributes:
        slots: into which workers pack batches for their way to the rank.
    """

    def __init__(self, dataset: ImageReportDataset) -> None:
        self.dataset = dataset
        self.slots: Slots | None = None

    def __getitem__(self, request: Any) -> Batch | PackedBatch | DataError:
        try:
            found: Batch = self.dataset[request]
            worker = torch.utils.data.get_worker_info()
            return found if worker is None or self.slots is None else self.slots.pack(found, worker.id)
        except DataError as error:
            return error
        except Exception as error:
            # MemoryError at a size that a damaged index claims, a bug, a broken library.
            return LoaderError(_unforeseen(error))


def _unforeseen(error: Exception) -> str:
    """What a user can report of it: kind and place, not its text, which may be a report's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/medvlp/" in frame.filename or "/shards/" in frame.filename]
    place = (own or frames)[-1]
    cause = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    worker = torch.utils.data.get_worker_info()
    who = "reading samples" if worker is None else f"data worker {worker.id} (process {os.getpid()})"
    return (
        f"{who} failed: {cause} in {Path(place.filename).name}:{place.lineno} ({place.name}); the "
        "dataset may be damaged (run medvlp shards verify), or the machine out of memory (lower data.workers)"
    )


def worker_death(error: RuntimeError) -> LoaderError | None:
    """What `DataLoader` says only in words, and at any moment (it listens to SIGCHLD): a worker ended.

    Returns:
        the error that names the worker and its signal; None if `error` is another.
    """
    if "DataLoader worker" not in str(error):  # torch has no class for it
        return None
    ends = [
        f"data worker {number} (process {worker.pid}) {_end(worker.exitcode)}"
        for number, worker in _workers
        if worker.exitcode
    ]
    return LoaderError(
        f"{' and '.join(ends) or 'a data worker ended'}. The system kills one when memory is short: lower "
        "data.workers, data.prefetch or the batch, and start again to resume"
    )


def _end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def kill_workers() -> None:
    """End all data workers without asking: they hold nothing, and one that is stopped answers no SIGTERM."""
    # torch's handler of SIGCHLD would raise about each of them, wherever this process then is.
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for _, worker in _workers:
        worker.kill()
        worker.join(_KILL_SECONDS)
    if all(worker.exitcode is not None for _, worker in _workers):  # else one ends later
        signal.signal(signal.SIGCHLD, previous)
    _workers.clear()


def _start_worker(worker: int) -> None:
    gc.freeze()  # else a collection writes to all that the rank has, and each page of it is copied
    cv2.setNumThreads(0)
    _workers.clear()  # its siblings are not its children
    # Signals for the rank's process group (torchrun's SIGTERM, Ctrl-C) are the rank's to act on: it saves and
    # ends its workers. Those of its parent, and the loss of it, still end a worker.
    os.setpgid(0, 0)
    # Slurm's warning goes to every process of a step, whatever its group; the rank hears its own.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

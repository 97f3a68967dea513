"""Checks of the prototype service on a GPU: rows on their way to the ring, a real cluster worker."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from medvlp.config import PrototypesConfig
from medvlp.prototypes.board import READY, Board, WorkerSettings
from medvlp.prototypes.ring import EmbeddingRing, StagedRing
from medvlp.prototypes.search import CentroidSearch, TorchIndex
from medvlp.prototypes.supervisor import WorkerSupervisor
from medvlp.prototypes.table import read_table
from tests.cuda.place import Place
from tests.cuda.runner import Note

WIDTH = 16


def staging(place: Place, note: Note) -> None:
    """Rows that leave a busy GPU behind its work arrive whole and in order, and adding them does not wait."""
    count, batch = (20, 4) if place.dry else (300, 256)
    staged = StagedRing(EmbeddingRing(count * batch, WIDTH))
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(count * batch, WIDTH, generator=generator), dim=1)
    busy = torch.randn(64 if place.dry else 4096, 64 if place.dry else 4096, device=place.device)
    on_device = rows.to(place.device)
    cuda, longest = place.device.type == "cuda", 0
    started = time.monotonic()
    for step, part in enumerate(on_device.split(batch)):
        busy = (busy @ busy).clamp(-1, 1)
        made = part * 1.0  # an operation behind the work in the queue, whose memory is given back at once
        with _waiting_refused(cuda):
            staged.add(made, torch.arange(step * batch, (step + 1) * batch), "image", step, None)
        longest = max(longest, len(staged._queue))
        del made
    note("add_seconds", (time.monotonic() - started) / count)
    note("longest_queue", longest)
    assert not cuda or longest > 2, "every copy was waited for"
    staged.flush(wait=True)
    found = staged.ring.rows()
    assert found.sample.tolist() == list(range(count * batch))
    torch.testing.assert_close(found.embeddings, rows, atol=2e-3, rtol=0)


@contextmanager
def _waiting_refused(cuda: bool) -> Iterator[None]:
    """Inside, torch raises where the host waits for the GPU (but for an event, as a full queue does)."""
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")


def assignment(place: Place, note: Note) -> None:
    """On the GPU, as a refresh does it, and on the CPU: one objective, nearly all ids; seconds of both."""
    rows, width = (500, 32) if place.dry else (131_072, 128)
    generator = torch.Generator().manual_seed(0)

    def unit(count: int) -> NDArray[np.float32]:
        return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1).numpy()

    given = unit(rows)
    for count in [50] if place.dry else [500, 16_384]:
        centroids, found, seconds = unit(count), [], []
        on_cpu, on_gpu = (
            CentroidSearch(count, width, PrototypesConfig(device=device, ivf_above=2**30), rows, 8)
            for device in ("cpu", "gpu")
        )
        for search in (on_cpu, TorchIndex(place.device, 1 << 30).search if place.dry else on_gpu):
            search(given[:64], centroids)
            started = time.monotonic()
            found.append(search(given, centroids))
            seconds.append(time.monotonic() - started)
        objective = abs(float(found[0][0].mean() - found[1][0].mean()))
        same = float((found[0][1] == found[1][1]).mean())
        note(
            f"{count} clusters",
            {"objective": objective, "same": same, "cpu": seconds[0], "gpu": seconds[1]},
        )
        assert on_gpu.on_gpu != place.dry, "the search went to the CPU: the log says why"
        assert objective < 1e-5
        assert same > 0.999


def worker(place: Place, note: Note) -> None:
    """A cluster worker finds the clusters of the ring; for few of them it makes no context on the GPU."""
    clusters, rows = 8, 512
    patience = 500.0 if place.dry else 40.0
    config = PrototypesConfig(sync=False, bank_rows=rows, iterations=5, worker_timeout_seconds=patience)
    with WorkerSupervisor() as supervisor:
        board = Board(supervisor.path)
        size = EmbeddingRing.size(rows, WIDTH)
        board.publish(WorkerSettings(0, 1, "", 1, rows, WIDTH, clusters, 1, size, asdict(config)))
        ring = EmbeddingRing(rows, WIDTH, board.ring_memory(0))
        generator = torch.Generator().manual_seed(0)
        centers = torch.nn.functional.normalize(torch.randn(clusters, WIDTH, generator=generator), dim=1)
        noise = 0.05 * torch.randn(rows, WIDTH, generator=generator)
        ring.add(centers.repeat(rows // clusters, 1) + noise, torch.arange(rows), "image", 1)
        started = time.monotonic()
        board.request(0, 1, ring.written)
        _wait_for(lambda: board.answered()[0] == 1, patience)
        note("first_refresh_seconds", time.monotonic() - started)
        assert board.answered()[1] == READY
        table, metrics = read_table(board, board.other_slot)
        similarity = float((centers @ table.centroids.T).max(1).values.min())
        note("similarity", similarity)
        note("metrics", metrics)
        assert similarity > 0.9
        if place.device.type == "cuda" and shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
            users = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
            # In a container it may list nobody, or by other numbers: then the check says nothing.
            note("nvidia_smi_lists_this_process", str(os.getpid()) in users)
            assert str(supervisor.worker_pid) not in users, "the worker holds memory of the GPU"


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the worker did not answer"
        time.sleep(0.02)

"""Time to write one step's embeddings into the ring that the cluster worker reads.

    python tests/benchmarks/ring_write.py [--rows 256] [--width 128] [--rounds 500] [--goal 0.2]

Shared memory as in a run (a memfd), one thread, embeddings already on the CPU; medians. Exits with 1 when a
write takes longer than the goal in milliseconds. With it: label bits, what each step adds to the agreement
of the ranks, and a reader's copy of the whole ring.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from medvlp.config import PrototypesConfig
from medvlp.prototypes.asynchronous import AsynchronousService
from medvlp.prototypes.board import BOARD, new_board
from medvlp.prototypes.ring import EmbeddingRing, label_bits

CAPACITY, FINDINGS = 16384, 14


def milliseconds(action: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return 1e3 * median(seconds)


def agreement(width: int) -> Callable[[], object]:
    """One step of a service whose worker has nothing to say (without the reduction itself)."""
    _, os.environ[BOARD] = new_board()
    service = AsynchronousService(PrototypesConfig(sync=False), 500, width)
    service.refresh(1)
    return lambda: service.agree(service.proposal(2), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--goal", type=float, default=0.2, help="milliseconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    descriptor, _ = new_board()
    size = EmbeddingRing.size(CAPACITY, options.width)
    os.ftruncate(descriptor, size)
    ring = EmbeddingRing(CAPACITY, options.width, mmap.mmap(descriptor, size))
    embeddings = torch.nn.functional.normalize(torch.randn(options.rows, options.width))
    sample = torch.arange(options.rows)
    labels = torch.randint(-1, 2, (options.rows, FINDINGS)).float()
    bits = label_bits(labels)
    write = milliseconds(lambda: ring.add(embeddings, sample, "image", 0, bits), options.rounds)
    table = Table(
        title=f"{options.rows} rows of width {options.width}, ring of {CAPACITY} ({size / 1e6:.1f} MB)"
    )
    table.add_column("what")
    table.add_column("median", justify="right")
    for what, value in {
        "write": write,
        "label bits": milliseconds(lambda: label_bits(labels), options.rounds),
        "proposal and agreement of a step": milliseconds(agreement(options.width), options.rounds),
        "read the whole ring": milliseconds(ring.rows, 20),
    }.items():
        table.add_row(what, f"{value:.3f} ms")
    Console(width=100).print(table)
    return 0 if write < options.goal else 1


if __name__ == "__main__":
    sys.exit(main())

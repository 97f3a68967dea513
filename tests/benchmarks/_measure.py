"""How the loss benchmarks measure: time, peak memory and the floor of the matrix products."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

#: Makes the inputs from a seed and returns (forward pass to a scalar, leaves with gradient).
Build = Callable[[], tuple[Callable[[], Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass: seconds (median), extra peak memory in bytes, matrix FLOP."""

    seconds: float
    memory: int
    flop: int


def cost(build: Build, rounds: int, threads: int) -> Cost:
    """Measure in a process of its own, so that the peak of the resident set is this side's alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (build, rounds, threads))


def _measure(build: Build, rounds: int, threads: int) -> Cost:
    torch.set_num_threads(threads)
    run, leaves = build()
    # Numerics libraries reserve their work space at the first product.
    torch.randn(256, 256) @ torch.randn(256, 256)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _peak()
    run().backward()
    memory = _peak() - before
    seconds = []
    for _ in range(rounds):
        for leaf in leaves:
            leaf.grad = None
        started = time.perf_counter()
        run().backward()
        seconds.append(time.perf_counter() - started)
    with FlopCounterMode(display=False) as counter:
        run().backward()
    return Cost(median(seconds), memory, counter.get_total_flops())


def _peak() -> int:
    """Largest resident set so far, in bytes (Linux)."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def matmul_rate(threads: int) -> float:
    """FLOP per second of large float32 products on this machine: the physical limit of a loss of products."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_matmul_rate, (threads,))


def _matmul_rate(threads: int) -> float:
    torch.set_num_threads(threads)
    left, right = torch.randn(1536, 1536), torch.randn(1536, 1536)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * 1536**3 / median(seconds[1:])


@dataclass(frozen=True)
class Comparison:
    """Two ways to compute the same loss, and what the fast one has to reach.

    Attributes:
        name: row of the table.
        loops, vectorised: both sides; module-level functions, because they run in processes of their own.
        faster: ratio of times to reach. smaller: ratio of memory to reach (0: none).
    """

    name: str
    loops: Build
    vectorised: Build
    faster: float
    smaller: float = 0.0


def compare(comparisons: Sequence[Comparison], title: str, rounds: int, threads: int) -> bool:
    """Check that both sides agree, measure them, print the table; whether every goal is reached."""
    table = Table(title=f"{title}; forward and backward, {threads} threads")
    for column in ("part", "loops", "vectorised", "ratio", "goal", "memory", "share of matmul floor"):
        table.add_column(column, justify="left" if column == "part" else "right")
    rate = matmul_rate(threads)
    reached = True
    for item in comparisons:
        values = [build()[0]().detach() for build in (item.loops, item.vectorised)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
        slow, fast = (cost(build, rounds, threads) for build in (item.loops, item.vectorised))
        ratio = slow.seconds / fast.seconds
        lighter = slow.memory / max(fast.memory, 1)
        reached = reached and ratio >= item.faster and lighter >= item.smaller
        table.add_row(
            item.name,
            f"{1e3 * slow.seconds:.0f} ms",
            f"{1e3 * fast.seconds:.0f} ms",
            f"{ratio:.1f}x",
            f"{item.faster:g}x",
            f"{slow.memory / 1e6:.0f} / {fast.memory / 1e6:.0f} MB",
            f"{fast.flop / rate / fast.seconds:.0%}",
        )
    Console(width=120).print(table)
    return reached

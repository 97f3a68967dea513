"""How the loss benchmarks measure: time in turns, peak memory and the floor of the matrix products."""

from __future__ import annotations

import argparse
import ctypes
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


def options(document: str, batch: int, threads: int = 2) -> argparse.Namespace:
    """The command line of a loss benchmark with this docstring: `batch`, `rounds` and `threads`."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=threads)
    return parser.parse_args()


@dataclass(frozen=True)
class Times:
    """Of forward and backward passes in turns.

    Attributes:
        loops, vectorised: seconds (median).
        ratio: of one turn's two times (median over the turns).
        floor: time of the vectorised side's matrix products at the rate of a large float32 product in the
            same turn, as a share of that side's time (median): the physical limit of a loss of products is 1.
    """

    loops: float
    vectorised: float
    ratio: float
    floor: float


def times(loops: Build, vectorised: Build, rounds: int, threads: int) -> Times:
    """Measure both sides and a product in turns, so that a change of the machine's speed hits all of them."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_times, (loops, vectorised, rounds, threads))


def _times(loops: Build, vectorised: Build, rounds: int, threads: int) -> Times:
    _keep_freed_memory()
    torch.set_num_threads(threads)
    left, right = torch.randn(1536, 1536), torch.randn(1536, 1536)
    slow, fast = loops(), vectorised()
    with FlopCounterMode(display=False) as counter:
        fast[0]().backward()
    turns = []
    for _ in range(rounds + 1):  # the first warms up
        product = _seconds(lambda: left @ right)
        turns.append((_pass(*slow), _pass(*fast), product))
    turns = turns[1:]
    flop = counter.get_total_flops() / (2 * 1536**3)
    return Times(
        loops=median(slow for slow, _, _ in turns),
        vectorised=median(fast for _, fast, _ in turns),
        ratio=median(slow / fast for slow, fast, _ in turns),
        floor=median(flop * product / fast for _, fast, product in turns),
    )


def _keep_freed_memory() -> None:
    """As a GPU's allocator does: glibc gives large blocks back, and new ones are cleared by the kernel."""
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    libc = ctypes.CDLL(None)
    for option in (trim_threshold, mmap_threshold):
        if not libc.mallopt(option, most):
            raise OSError(f"mallopt({option}, {most}) was refused")


def _pass(run: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    for leaf in leaves:
        leaf.grad = None
    return _seconds(lambda: run().backward())


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def memory(build: Build, threads: int) -> int:
    """Extra peak memory of one pass, in bytes; in a process whose resident set is this side's alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (build, threads))


def _memory(build: Build, threads: int) -> int:
    torch.set_num_threads(threads)
    run, _ = build()
    # Numerics libraries reserve their work space at the first product.
    torch.randn(256, 256) @ torch.randn(256, 256)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _peak()
    run().backward()
    return _peak() - before


def _peak() -> int:
    """Largest resident set so far, in bytes (Linux)."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@dataclass(frozen=True)
class Comparison:
    """Two ways to compute the same loss, and what the fast one has to reach.

    Attributes:
        name: row of the table.
        loops, vectorised: both sides; module-level functions, because they run in processes of their own.
        faster: ratio of times to reach. smaller: ratio of memory to reach (0: none).
        floor: share of the matmul floor to reach (0: none).
    """

    name: str
    loops: Build
    vectorised: Build
    faster: float
    smaller: float = 0.0
    floor: float = 0.0


def compare(comparisons: Sequence[Comparison], title: str, rounds: int, threads: int) -> bool:
    """Check that both sides agree, measure them, print the table; whether every goal is reached."""
    table = Table(title=f"{title}; forward and backward, {threads} threads, {rounds} turns")
    for column in ("part", "loops", "vectorised", "ratio", "goal", "memory", "share of matmul floor"):
        table.add_column(column, justify="left" if column == "part" else "right")
    reached = True
    for item in comparisons:
        values = [build()[0]().detach() for build in (item.loops, item.vectorised)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
        measured = times(item.loops, item.vectorised, rounds, threads)
        heavy, light = (memory(build, threads) for build in (item.loops, item.vectorised))
        reached &= measured.ratio >= item.faster and heavy >= item.smaller * light
        reached &= measured.floor >= item.floor
        table.add_row(
            item.name,
            f"{1e3 * measured.loops:.0f} ms",
            f"{1e3 * measured.vectorised:.0f} ms",
            f"{measured.ratio:.1f}x",
            f"{item.faster:g}x",
            f"{heavy / 1e6:.0f} / {light / 1e6:.0f} MB",
            f"{measured.floor:.0%}",
        )
    Console(width=120).print(table)
    return reached

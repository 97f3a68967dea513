"""What the prototype service would cost on 1,024 ranks, calculated from what is measured here.

    python tests/benchmarks/prototype_scale.py [--threads-per-worker 8]

Measured on one thread of this machine: FAISS's exact search (arithmetic per second at widths 128 and 768),
its inverted file, adding rows up by cluster, and the time to publish a table (broadcast aside: checks and
fingerprint). Assumed, and printed with the result: 128 nodes of 8 ranks, 128 pairs a rank, 50 GB/s for a
rank's collectives, 2.5 GB/s and 0.1 ms for one between cluster workers, threads of a worker that scale.
Prints two tables in markdown. Nothing of it has run on more than one machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from medvlp.config import PrototypesConfig
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.kmeans import ClusterSums
from medvlp.prototypes.search import CentroidSearch
from medvlp.prototypes.table import PrototypeTable

NODES, RANKS, PAIRS = 128, 1024, 128
DEVICE_BANDWIDTH, HOST_BANDWIDTH, HOST_LATENCY = 50e9, 2.5e9, 1e-4
SIZES = [(500, 128), (3_000, 768), (16_384, 768), (65_536, 768)]
CONFIG = PrototypesConfig()


@dataclass(frozen=True)
class Constants:
    """Measured on one thread.

    Attributes:
        exact: multiply-adds per second of the exact search, by width.
        inverted: the same of scanning the lists of an inverted file.
        adding: numbers per second added to cluster sums. hashing: bytes per second of a fingerprint.
    """

    exact: dict[int, float]
    inverted: float
    adding: float
    hashing: float


def least(function: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the fastest call."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken)


def random_rows(count: int, width: int) -> torch.Tensor:
    return unit_norm(torch.randn(count, width, generator=torch.Generator().manual_seed(count)))


def measure() -> Constants:
    """Seconds of each part on sizes that take a moment."""
    exact = {}
    for width in (128, 768):
        rows, centroids = random_rows(8192, width).numpy(), random_rows(3000, width).numpy()
        search = CentroidSearch(3000, width, PrototypesConfig(device="cpu"), 8192, 1)
        exact[width] = 8192 * 3000 * width / least(lambda: search(rows, centroids))  # noqa: B023
    rows, centroids = random_rows(4096, 768).numpy(), random_rows(16_384, 768).numpy()
    search = CentroidSearch(16_384, 768, PrototypesConfig(device="cpu", ivf_above=0), 4096, 1)
    search(rows[:1], centroids)  # learns the lists
    scanned = least(lambda: search(rows, centroids)) - 4096 * lists(16_384) * 768 / exact[768]
    inverted = 4096 * scanned_rows(16_384) * 768 / scanned
    many = random_rows(65_536, 128)
    nearest = torch.randint(0, 500, (65_536,)).numpy()
    adding = many.numel() / least(lambda: ClusterSums(many, 500).update(nearest))
    table = PrototypeTable.start(random_rows(16_384, 768))
    hashing = 4 * table.centroids.numel() / least(table._digest)
    return Constants(exact, inverted, adding, hashing)


def lists(clusters: int) -> float:
    """Lists of an inverted file, whose centers are searched exactly."""
    return 4 * clusters**0.5


def scanned_rows(clusters: int) -> float:
    """Centroids in the 16 lists that are searched."""
    return 16 * clusters / lists(clusters)


def step_row(clusters: int, width: int) -> list[str]:
    """Bytes and calculated seconds that a training step pays, per rank."""
    bias = 4 * (clusters + 1)
    # `logsumexp_over_ranks` reduces twice (maximum, sum): for two modalities and three iterations.
    sinkhorn = 2 * 3 * 2 * 4 * clusters
    ring = 2 * PAIRS * (2 * width + 8 + 1 + 8 + 8)
    product = 2 * 2 * PAIRS * clusters * width
    return [
        f"{clusters:,} x {width}",
        f"{4e-6 * clusters * width:.1f} MB",
        f"{1e-9 * product:.2f} GFLOP",
        f"{bias / 1e3:.0f} kB, {1e3 * 2 * bias / DEVICE_BANDWIDTH:.3f} ms",
        f"{sinkhorn / 1e3:.0f} kB, {1e3 * 2 * sinkhorn / DEVICE_BANDWIDTH:.3f} ms",
        f"{ring / 1e3:.0f} kB",
    ]


def refresh_row(clusters: int, width: int, constants: Constants, threads: int) -> list[str]:
    """Bytes and calculated seconds of a refresh, per node."""
    held = RANKS * CONFIG.bank_rows
    used = min(held, CONFIG.max_points * clusters)
    rows = used / NODES
    passes = CONFIG.iterations + 1
    if clusters > CONFIG.ivf_above:
        each = lists(clusters) / constants.exact[width] + scanned_rows(clusters) / constants.inverted
        learning = 10 * clusters * lists(clusters) / constants.exact[width]  # FAISS makes 10 iterations
    else:
        each, learning = clusters / constants.exact[width], 0.0
    search = (passes * rows * each + learning) * width / threads
    adding = CONFIG.iterations * rows * width / constants.adding
    packed = 8 * clusters * (width + 1)
    travel = CONFIG.iterations * (2 * packed / HOST_BANDWIDTH + 14 * HOST_LATENCY)
    table = 4 * clusters * (width + 3)
    publish = table / HOST_BANDWIDTH + table / constants.hashing
    steps = 8 * 2 * PAIRS * NODES
    return [
        f"{clusters:,} x {width}",
        f"{used / 1e6:.2f} M of {held / 1e6:.1f} M",
        f"{-(-CONFIG.min_points * clusters // steps)} / {-(-used // steps):.0f}",
        f"{packed / 1e6:.1f} MB",
        f"{search:.2f} s",
        f"{adding:.2f} s",
        f"{travel:.2f} s",
        f"{publish:.2f} s",
        f"{search + adding + travel + publish:.1f} s",
    ]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads-per-worker", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    constants, threads = measure(), options.threads_per_worker
    exact = " and ".join(f"{rate / 1e9:.1f}" for rate in constants.exact.values())
    print(
        f"Measured on one thread: exact search {exact} G multiply-adds/s (widths 128, 768), inverted lists "
        f"{constants.inverted / 1e9:.1f} G/s, cluster sums {constants.adding / 1e6:.0f} M numbers/s, "
        f"fingerprint {constants.hashing / 1e6:.0f} MB/s.\n"
    )
    print(
        f"Calculated for {RANKS:,} ranks on {NODES} nodes, {PAIRS} pairs a rank, "
        f"{DEVICE_BANDWIDTH / 1e9:g} GB/s between ranks, {HOST_BANDWIDTH / 1e9:g} GB/s and "
        f"{1e3 * HOST_LATENCY:g} ms between cluster workers of {threads} threads.\n\nPer step and rank:\n"
    )
    header = [
        "K x D",
        "table (fp32)",
        "scores of both modalities",
        "balance: bias",
        "balance: sinkhorn",
        "ring",
    ]
    print(markdown(header, [step_row(*size) for size in SIZES]))
    print(
        f"\nPer refresh and node ({CONFIG.iterations} iterations, at most {CONFIG.max_points} rows for each "
        "cluster; steps: until there is one row for each cluster / until the rows used are there):\n"
    )
    header = [
        "K x D",
        "rows used",
        "steps",
        "sums (fp64)",
        "search",
        "adding",
        "all-reduces",
        "publish",
        "all",
    ]
    print(markdown(header, [refresh_row(*size, constants, threads) for size in SIZES]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

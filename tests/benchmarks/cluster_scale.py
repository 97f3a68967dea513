"""What a run costs on 8, 64 and 1,024 ranks, calculated from what is measured here: a page in markdown.

    python tests/benchmarks/cluster_scale.py [--threads-per-worker 8] [--gpu-samples 2370] [--shared-gbps 5]

Measured on one thread of this machine: FAISS's exact search (arithmetic per second at widths 128 and 768),
its inverted file, adding rows up by cluster, the fingerprint of a table, a copy in memory, the loader's
samples per second, a small all-reduce of gloo between two processes, and what the training loop spends on
the agreement of its ranks. Assumed, and printed with the result: the model (MGCA with ViT-B and BERT-base),
what a GPU computes, nodes of 8 ranks, networks, and the shared storage. Nothing of it has run on more than
one machine: it says what to look at first, and the key that moves it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.kmeans import ClusterSums
from medvlp.prototypes.search import CentroidSearch
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.consensus import Consensus
from medvlp.training.interrupts import Interrupts
from tests.benchmarks.data_path import build_dataset, loader_contender
from tests.distributed_pool import GlooPool

RANKS = (8, 64, 1024)
RANKS_PER_NODE, PAIRS = 8, 128
DEVICE_BANDWIDTH, HOST_BANDWIDTH, HOST_LATENCY = 50e9, 2.5e9, 1e-4
#: MGCA with ViT-B/16 and BERT-base: parameters, width of the shared space, bytes of a stored image and text.
PARAMETERS, WIDTH, SAMPLE_BYTES = 202e6, 128, 15_000
#: Seconds from process start to the end of the first step without reading (checkpoint_stall.py).
START_SECONDS = 7.2
TABLES = ((500, 128), (16_384, 768))
CONFIG = PrototypesConfig()


@dataclass(frozen=True)
class Constants:
    """Measured on one thread.

    Attributes:
        exact: multiply-adds per second of the exact search, by width.
        inverted: the same of scanning the lists of an inverted file.
        adding: numbers per second added to cluster sums. hashing: bytes per second of a fingerprint.
        copying: bytes per second of a copy in memory. loading: samples per second of the loader on one core.
        hop: seconds of one message of gloo between two processes.
        hearing: seconds that two ranks' training loops spend on an agreement.
    """

    exact: dict[int, float]
    inverted: float
    adding: float
    hashing: float
    copying: float
    loading: float
    hop: float
    hearing: float


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


def agreement_seconds(rounds: int = 200) -> float:
    """Of one reduction of three numbers over the ranks, as between two steps."""
    return least(lambda: distributed.greatest_integers_later([0, 0, 0])(), rounds)


def hearing_seconds(steps: int = 200, step_seconds: float = 0.02) -> float:
    """What the loop spends on an agreement; the messages travel behind steps that need no core."""
    spent = []
    with Interrupts() as interrupts:
        consensus = Consensus(interrupts)
        for step in range(1, steps + 1):
            time.sleep(step_seconds)
            started = time.perf_counter()
            consensus.reach(step)
            spent.append(time.perf_counter() - started)
    return statistics.median(spent)


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
    source, target = torch.zeros(64 << 20, dtype=torch.uint8), torch.zeros(64 << 20, dtype=torch.uint8)
    copying = source.numel() / least(lambda: target.copy_(source))
    pool = GlooPool(2, timeout=120)
    hop = pool.run(agreement_seconds)[0] / 2  # there and back
    hearing = pool.run(hearing_seconds)[0]
    pool.close()
    return Constants(exact, inverted, adding, hashing, copying, loading_rate(), hop, hearing)


def loading_rate() -> float:
    """Samples per second of the loader with MGCA's transform, in this process."""
    from medvlp.data.text import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        build_dataset(root, 400)
        run = loader_contender(root, Tokenizer.load(None, root), workers=0)
        count = run()
        return count / least(run)


def lists(clusters: int) -> float:
    """Lists of an inverted file, whose centers are searched exactly."""
    return 4 * clusters**0.5


def scanned_rows(clusters: int) -> float:
    """Centroids in the 16 lists that are searched."""
    return 16 * clusters / lists(clusters)


def refresh_seconds(ranks: int, clusters: int, width: int, constants: Constants, threads: int) -> float:
    """Of a refresh on every node: search, sums, all-reduces of the workers, publishing."""
    nodes = ranks // RANKS_PER_NODE
    rows = min(ranks * CONFIG.bank_rows, CONFIG.max_points * clusters) / nodes
    if clusters > CONFIG.ivf_above:
        each = lists(clusters) / constants.exact[width] + scanned_rows(clusters) / constants.inverted
        learning = 10 * clusters * lists(clusters) / constants.exact[width]  # FAISS makes 10 iterations
    else:
        each, learning = clusters / constants.exact[width], 0.0
    search = ((CONFIG.iterations + 1) * rows * each + learning) * width / threads
    adding = CONFIG.iterations * rows * width / constants.adding
    packed = 8 * clusters * (width + 1)
    hops = 2 * math.ceil(math.log2(nodes)) if nodes > 1 else 0
    travel = CONFIG.iterations * ((2 * packed / HOST_BANDWIDTH if hops else 0.0) + hops * HOST_LATENCY)
    table = 4 * clusters * (width + 3)
    return search + adding + travel + table / HOST_BANDWIDTH + table / constants.hashing


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms" if seconds >= 1e-3 else f"{1e3 * seconds:.2f} ms"


def count_of_steps(steps: int) -> str:
    """With the noun's number."""
    return f"{steps:,} step{'s' * (steps > 1)}"


def column(ranks: int, constants: Constants, options: argparse.Namespace) -> list[str]:
    """One size, a cell for each row of `ROWS`."""
    nodes, samples = ranks // RANKS_PER_NODE, ranks * options.gpu_samples
    step, shared = PAIRS / options.gpu_samples, 1e9 * options.shared_gbps
    gathered = 2 * ranks * PAIRS * WIDTH * 4
    logits = 6 * 4 * PAIRS**2 * ranks
    gradients = 2 * 2 * PARAMETERS / DEVICE_BANDWIDTH
    agreement = 2 * (ranks - 1) * constants.hop
    written = 16 * PARAMETERS  # float32 weights, masters and two moments
    saving = written / shared
    stall = written / ranks / constants.copying
    restart = START_SECONDS + (written + 4 * PARAMETERS * ranks) / shared
    bandwidth = samples * SAMPLE_BYTES
    cores = options.gpu_samples / constants.loading
    refreshes = [refresh_seconds(ranks, *size, constants, options.threads_per_worker) for size in TABLES]
    needed = [math.ceil(seconds / step) for seconds in refreshes]
    return [
        f"{samples:,.0f} samples/s, {ranks * PAIRS:,} in a batch, {milliseconds(step)} a step",
        f"{gathered / 1e6:,.1f} MB, {milliseconds(2 * gathered / DEVICE_BANDWIDTH)}",
        f"{logits / 1e6:,.0f} MB",
        f"{milliseconds(gradients)}, behind the backward pass",
        f"{milliseconds(agreement)}, behind {count_of_steps(math.ceil(agreement / step))}",
        *(
            f"{seconds:.{0 if seconds >= 10 else 2}f} s, within {count_of_steps(steps)}"
            for seconds, steps in zip(refreshes, needed, strict=True)
        ),
        f"{milliseconds(stall)}; {saving:.1f} s to the disk = {math.ceil(saving / step):,} steps",
        f"{restart:.0f} s",
        f"{bandwidth / 1e9:.2f} GB/s, {bandwidth / shared:.0%} of the storage",
        f"{cores:.1f} of a rank, {cores * RANKS_PER_NODE:.0f} of a node",
        f"{nodes}: each node reads one an epoch" if nodes > 1 else "one copy of the dataset",
    ]


ROWS = (
    ("speed", "train.global_batch"),
    ("gather of embeddings, forward and back", "method.negatives=local"),
    ("logits of a rank", "train.micro_batch"),
    ("gradients, all-reduced in bf16", "zero.stage, deepspeed.zero_optimization"),
    ("agreement of the ranks (ring of gloo)", "train.agree_every"),
    ("refresh, K 500 x 128 (behind the training)", "prototypes.refresh_steps"),
    ("refresh, K 16,384 x 768", "prototypes.refresh_steps, max_points, device"),
    ("checkpoint: the loop waits; written", "checkpoint.every_steps"),
    ("restart to the first step", "checkpoint.every_minutes"),
    ("data from the shared storage", "data.cache_dir, data.partitions"),
    ("cores that load", "data.workers, cpus_per_task"),
    ("parts of the dataset with data.partitions", "data.partitions"),
)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads-per-worker", type=int, default=8)
    parser.add_argument("--gpu-samples", type=float, default=2370, help="samples/s of a GPU (H100 at 40 %%)")
    parser.add_argument("--shared-gbps", type=float, default=5, help="GB/s of the shared storage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    constants = measure()
    exact = " and ".join(f"{rate / 1e9:.1f}" for rate in constants.exact.values())
    print(
        f"Measured on one thread: exact search {exact} G multiply-adds/s (widths 128, 768), inverted lists "
        f"{constants.inverted / 1e9:.1f} G/s, cluster sums {constants.adding / 1e6:.0f} M numbers/s, "
        f"fingerprint {constants.hashing / 1e6:.0f} MB/s, copy in memory {constants.copying / 1e9:.1f} GB/s, "
        f"loader {constants.loading:,.0f} samples/s, one message of gloo {1e6 * constants.hop:.0f} us, "
        f"an agreement behind a step of 20 ms {1e6 * constants.hearing:.0f} us of the loop.\n\n"
        f"Assumed: {PARAMETERS / 1e6:.0f} M parameters, {options.gpu_samples:,.0f} samples/s of a GPU, "
        f"{PAIRS} pairs a rank, {RANKS_PER_NODE} ranks a node, "
        f"{DEVICE_BANDWIDTH / 1e9:g} GB/s between ranks, "
        f"{HOST_BANDWIDTH / 1e9:g} GB/s and {1e3 * HOST_LATENCY:g} ms between cluster workers of "
        f"{options.threads_per_worker} threads, {options.shared_gbps:g} GB/s from and to the shared "
        "storage.\n"
    )
    columns = [column(ranks, constants, options) for ranks in RANKS]
    rows = [[name, *cells, key] for (name, key), *cells in zip(ROWS, *columns, strict=True)]
    print(markdown(["", *(f"{ranks:,} ranks" for ranks in RANKS), "key"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

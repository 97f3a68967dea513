"""Share of a ViT-B-size training step that assigning embeddings to service clusters takes.

    python tests/benchmarks/assign_share.py [--batch 4] [--rounds 5] [--threads 1]

The step is that of MGCA's config (ViT-B/16 at 224 pixels, 12-layer BERT of 768, 112 tokens, embeddings of
128): forward, backward and AdamW, on random images and reports. Beside it the soft assignment of the same
batch's images and reports to 500 and to 16,384 clusters, by each kind of balance, and the hard one that
false-negative masks need. One process, so no collective is in it (tests/benchmarks/cluster_scale.py
calculates those). Exits with 1 if an assignment takes more than 2 % of the step at 500 clusters, or 5 % at
16,384.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.losses.normalise import unit_norm
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.registry import build_method
from medvlp.prototypes.running_bias import RunningBias
from medvlp.prototypes.table import PrototypeTable

VOCABULARY, TOKENS, WIDTH = 28_996, 112, 128
#: Largest share of the step by number of clusters.
GOALS = {500: 0.02, 16_384: 0.05}


def training_step(batch: int) -> Callable[[], object]:
    """One optimiser step of MGCA at its published size."""
    config = Config()
    config.image.name, config.data.max_tokens = "vit_base_patch16_224", TOKENS
    config.method = MGCAConfig(prototypes=500, embedding=WIDTH, head_hidden=2048)
    torch.manual_seed(0)
    method = build_method(config, VOCABULARY)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-5)
    ids = torch.randint(5, VOCABULARY, (batch, TOKENS))
    word = torch.arange(TOKENS).expand(batch, -1)
    sentence = torch.zeros_like(ids)
    sentence[:, [0, -1]] = -1
    images = torch.randint(0, 256, (batch, 1, 224, 224), dtype=torch.uint8)
    text = Text(ids, torch.ones_like(ids), word, sentence)
    data = Batch(images, text, torch.arange(batch), torch.zeros(batch, 1), ["key"] * batch)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        method(data).loss.backward()
        optimizer.step()

    return step


def assignments(batch: int, clusters: int) -> dict[str, Callable[[], object]]:
    """What a step may ask of a table, for [B, 128] images and as many reports."""
    generator = torch.Generator().manual_seed(0)
    images, reports = unit_norm(torch.randn(2, batch, WIDTH, generator=generator))
    centroids = torch.randn(clusters, WIDTH, generator=generator)
    tables = {kind: PrototypeTable.start(centroids, balance=kind) for kind in ("sinkhorn", "bias", "none")}
    running = RunningBias(clusters)
    balanced = tables["bias"].balanced_by(running)

    def soft(table: PrototypeTable) -> Callable[[], object]:
        return lambda: [table.soft_assign(images), table.soft_assign(reports)]

    def bias() -> None:
        soft(balanced)()
        running.step()

    return {
        "sinkhorn": soft(tables["sinkhorn"]),
        "bias": bias,
        "none": soft(tables["none"]),
        "hard (masks)": lambda: tables["none"].assign(reports),
    }


def seconds(function: Callable[[], object], rounds: int) -> float:
    """Median of several calls, after one to warm up."""
    function()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    whole = seconds(training_step(options.batch), options.rounds)
    title = f"batch of {options.batch}, {options.threads} threads; a step takes {whole:.2f} s"
    table = Table(title=title)
    for column in ("clusters", "balance", "milliseconds", "share of the step", "goal"):
        table.add_column(column, justify="right")
    reached = True
    for clusters, goal in GOALS.items():
        for name, function in assignments(options.batch, clusters).items():
            taken = seconds(function, 20 * options.rounds)
            reached = reached and taken <= goal * whole
            share = f"{taken / whole:.3%}"
            table.add_row(f"{clusters:,}", name, f"{1e3 * taken:.2f}", share, f"{goal:.0%}")
    Console(width=110).print(table)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())

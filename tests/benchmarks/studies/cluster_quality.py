"""How well clusters agree with findings: over the training, and against those of the untrained network.

    python tests/benchmarks/studies/cluster_quality.py RUN [RUN ...] [--clusters 64] [--samples 4000]

First the agreement that runs with a prototype service measured at each refresh (`metrics.jsonl`), and the
quality of their masks of false negatives (mean of the last quarter of the logged steps). Then, for every run,
the clusters that one refresh finds in the same training samples with the trained and the untrained network:
equal K, samples and seed, batch norms on batch statistics as in training. Last, for the trained network,
which pairs of samples a mask would leave out if images, reports or either decided, and how many of these
pairs share a finding or both have none.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.data.cache import open_reader
from medvlp.data.loader import build_loader
from medvlp.evaluation.features import load_models
from medvlp.methods.base import Method
from medvlp.methods.registry import fields_of
from medvlp.prototypes.cluster_metrics import nmi
from medvlp.prototypes.refresh import refresh_table
from medvlp.prototypes.ring import MODALITIES, BankRows, label_bits
from medvlp.prototypes.table import PrototypeTable
from medvlp.runs.saved_run import load_config, load_tokenizer, locate

#: Share of the logged steps, counted from the last one, over which figures of masks are averaged.
LAST = 0.25


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def series(lines: list[dict[str, Any]], name: str) -> list[float]:
    """Values of a metric in the order of the steps, without those that were not finite."""
    return [line[name] for line in lines if line.get(name) is not None]


def over_training(runs: list[Path]) -> Table:
    """Agreement at the first and last refresh of a full ring and whether it rises; quality of the masks.

    Agreement by chance is higher among fewer rows, so refreshes before the ring is full do not compare.
    """
    table = Table(title="clusters of the service over the training, from the first refresh of a full ring on")
    names = ("refreshes", "NMI first", "NMI last", "Spearman", "purity", "churn", "masked", "mask precision")
    table.add_column("run")
    for name in names:
        table.add_column(name, justify="right")
    for run in runs:
        lines = read_metrics(run)
        rows = series(lines, "prototypes/rows")
        full = [line for line in lines if rows and line.get("prototypes/rows") == max(rows)]
        agreement = series(full, "prototypes/nmi")
        if not agreement:
            continue
        rises = spearmanr(range(len(agreement)), agreement).statistic if len(agreement) > 2 else float("nan")
        cells = [f"{agreement[0]:.3f}", f"{agreement[-1]:.3f}", f"{rises:+.2f}"]
        cells += [f"{full[-1].get(f'prototypes/{name}', float('nan')):.3f}" for name in ("purity", "churn")]
        for name in ("prototypes/masked", "prototypes/mask_precision"):
            values = series(lines, name)
            kept = values[-max(1, int(LAST * len(values))) :]
            cells.append(f"{sum(kept) / len(kept):.3f}" if kept else "-")
        table.add_row(run.name, str(len(agreement)), *cells)
    return table


@torch.no_grad()
def embed_training_samples(method: Method, batches: Iterator[Batch]) -> BankRows:
    """What the ring would hold after these batches: both modalities of every sample."""
    method.train()
    parts = []
    for batch in batches:
        labels = label_bits(batch.labels)
        for modality, values in method(batch).embeddings.items():
            same = torch.full_like(batch.sample, MODALITIES.index(modality), dtype=torch.uint8)
            parts.append(BankRows(values, batch.sample, same, torch.zeros_like(batch.sample), labels))
    return BankRows.joined(parts)


def training_batches(config: Config, tokenizer: Any, samples: int) -> Iterator[Batch]:
    """Batches of the run's training order that hold `samples` samples, in one process."""
    size = config.train.global_batch
    fields = fields_of(config.method.name)
    loader = build_loader(config, open_reader(config.data), tokenizer, 0, 1, size, 0, fields)
    return islice(iter(loader), -(-samples // size))


def mask_rules(rows: BankRows, table: PrototypeTable) -> dict[str, tuple[float, float]]:
    """Rule -> share of the pairs of samples left out, and how many of those agree in their findings."""
    ids = table.assign(rows.embeddings)
    sides = [rows.modality == number for number in range(len(MODALITIES))]
    if not all(side.any() for side in sides):
        return {}
    image, report = (_same(ids[side]) for side in sides)
    bits = rows.labels[sides[0]]
    agree = ((bits[:, None] & bits) != 0) | ((bits[:, None] == 0) & (bits == 0))
    known = (bits >= 0)[:, None] & (bits >= 0) & ~torch.eye(len(bits), dtype=torch.bool)
    rules = {"any pair": torch.ones_like(known), "image": image, "report": report, "either": image | report}
    return {
        name: ((pairs & known).sum().item() / known.sum().item(), agree[pairs & known].float().mean().item())
        for name, pairs in rules.items()
    }


def _same(values: Tensor) -> Tensor:
    return values[:, None] == values


def against_untrained(runs: list[Path], clusters: int, samples: int) -> tuple[Table, Table]:
    """One refresh on the same samples by the untrained and the trained network; and the rules of masks."""
    quality = Table(title=f"K={clusters}, {samples} training samples: untrained -> trained")
    for column in ("run", "NMI", "NMI of images", "NMI of reports", "purity"):
        quality.add_column(column, justify="left" if column == "run" else "right")
    rules = Table(title="pairs left out by")
    for column in ("run", "rule", "share of pairs", "precision"):
        rules.add_column(column, justify="left" if column in ("run", "rule") else "right")
    for run in runs:
        source = locate(run)
        config = load_config(source, ["data.workers=0"])
        tokenizer = load_tokenizer(source, config)
        figures: dict[str, list[float]] = {}
        for name, method in load_models(source, config, tokenizer, torch.device("cpu")).items():
            rows = embed_training_samples(method, training_batches(config, tokenizer, samples))
            table, refreshed = refresh_table(rows, None, config.prototypes, clusters, config.train.seed)
            if table is None:
                raise SystemExit(f"{len(rows.sample)} embeddings are too few for {clusters} clusters")
            sides = [nmi_of_modality(rows, table, number) for number in range(len(MODALITIES))]
            figures[name] = [refreshed["prototypes/nmi"], *sides, refreshed["prototypes/purity"]]
            if name == "trained":
                for rule, (share, precision) in mask_rules(rows, table).items():
                    rules.add_row(run.name, rule, f"{share:.3f}", f"{precision:.3f}")
        both = zip(figures["untrained"], figures["trained"], strict=True)
        quality.add_row(run.name, *(f"{before:.3f} -> {after:.3f}" for before, after in both))
    return quality, rules


def nmi_of_modality(rows: BankRows, table: PrototypeTable, number: int) -> float:
    """Agreement of clusters and label sets among the labelled rows of one modality."""
    chosen = (rows.modality == number) & (rows.labels >= 0)
    ids = table.assign(rows.embeddings[chosen])
    return nmi(ids.numpy(), rows.labels[chosen].numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4000)
    options = parser.parse_args()
    console = Console(width=120)
    console.print(over_training(options.runs))
    for table in against_untrained(options.runs, options.clusters, options.samples):
        console.print(table)


if __name__ == "__main__":
    main()

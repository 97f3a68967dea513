"""Training on large stored images with `data.transform.reduced_decoding`, beside decoding them whole.

    python tests/benchmarks/reduced_decoding.py [--studies 40] [--rounds 5]

Our training loader on phantom shards of 1,024 and 2,048 pixels, with images of 224 pixels: all of a stored
image (crop none), and parts of 20 to 100 % of its area (crop area). Both ways take turns on one core, without
worker processes; rates are medians over rounds, ratios medians of the ratios within a round. Pixels are
compared image by image, in levels of 255: a part also moves by up to a pixel of the smaller image. Exits with
1 if reduced decoding is not `GOAL` times as fast.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import cv2
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.data.loader import build_loader
from medvlp.data.text import Tokenizer
from shards.reader import ShardReader
from tests.benchmarks.data_path import SPLIT, build_dataset, measure

SIZE, BATCH, GOAL = 224, 8, 1.2


def batches(root: Path, crop: str, reduced: bool) -> Iterator[Batch]:
    """An epoch of the split."""
    config = Config()
    config.data.root, config.data.image_size, config.data.workers = str(root), SIZE, 0
    config.data.transform.crop = crop  # type: ignore[assignment]
    config.data.transform.reduced_decoding, config.train.global_batch = reduced, BATCH
    loader = build_loader(config, ShardReader(root), Tokenizer.load(None, root), 0, 1, BATCH)
    return itertools.islice(loader, loader.steps_per_epoch)


def loaded(root: Path, crop: str, reduced: bool) -> int:
    return sum(len(batch.keys) for batch in batches(root, crop, reduced))


def distance(root: Path, crop: str) -> float:
    """Mean difference of pixels, in levels of 255."""
    pairs = zip(batches(root, crop, False), batches(root, crop, True), strict=True)
    found = [(whole.image.float() - smaller.image.float()).abs().mean() for whole, smaller in pairs]
    return torch.stack(found).mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table("stored", "bytes", "crop", "whole", "reduced", "ratio", "pixels differ by")
    reached = True
    with tempfile.TemporaryDirectory() as folder:
        for side in 1024, 2048:
            build_dataset(Path(folder) / str(side), options.studies, side)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        for side, crop in itertools.product((1024, 2048), ("none", "area")):
            root = Path(folder) / str(side)
            reader = ShardReader(root)
            size = sum(len(reader.image(SPLIT, at)) for at in range(BATCH)) / BATCH
            ways = {name: partial(loaded, root, crop, name == "reduced") for name in ("whole", "reduced")}
            rates = measure(ways, options.rounds)
            ratio = median(b / a for a, b in zip(rates["whole"], rates["reduced"], strict=True))
            reached &= ratio >= GOAL
            shown = [f"{median(rates[name]):.0f}/s" for name in ways]
            apart = f"{distance(root, crop):.2f}"
            table.add_row(f"{side} px", f"{size / 1000:.0f} kB", crop, *shown, f"{ratio:.1f}x", apart)
    Console(width=110).print(table)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())

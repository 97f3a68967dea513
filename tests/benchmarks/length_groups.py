"""Texts in groups of similar length against one batch padded to its longest (`text.length_groups`).

    python tests/benchmarks/length_groups.py [SHARDS] [--batch 48] [--batches 4] [--rounds 3]

A BERT of MiniLM's size (6 layers of width 384, random start) on one thread, forward and backward with the
gradients of all weights, on batches of the training split of SHARDS (default: phantoms), cut at 128 tokens.
The numbers of groups take turns on the same batches, outputs are checked to agree, the median of the rounds
counts. The physical limit is no padding at all: the share of the padded positions that hold tokens. Exits
with 1 if four groups save less than half of the time that this share leaves to save.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from data_path import build_dataset

from medvlp.config import Config, TextConfig
from medvlp.data.batch import Text
from medvlp.data.cache import open_reader
from medvlp.data.loader import build_loader
from medvlp.data.text import Tokenizer
from medvlp.encoders.text import TextEncoder

GROUPS = (1, 2, 4, 8)
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
GOAL = 0.5


def texts(root: Path, batch: int, batches: int) -> tuple[list[Text], int]:
    """Reports of the first batches of an epoch, and the size of the vocabulary."""
    config = Config()
    config.data.root, config.data.workers = str(root), 0
    config.data.max_tokens, config.train.global_batch = 128, batch
    tokenizer = Tokenizer.load(None, root)
    loader = build_loader(config, open_reader(config.data), tokenizer, 0, 1, batch)
    return [read.text for read in islice(loader, batches)], tokenizer.vocab_size


def seconds(encoder: TextEncoder, given: list[Text], groups: int) -> float:
    """Of forward and backward passes over all batches."""
    encoder.config.length_groups = groups
    start = time.perf_counter()
    for text in given:
        encoder.zero_grad()
        encoder(text).hidden.square().mean().backward()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path, nargs="?")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = options.shards or Path(folder) / "shards"
        if options.shards is None:
            build_dataset(root, 2 * options.batch * options.batches)
        given, vocabulary = texts(root, options.batch, options.batches)
    encoder = TextEncoder(TextConfig(options=MINILM, dropout=0.0), vocabulary)
    whole = []
    for encoder.config.length_groups in GROUPS:
        with torch.no_grad():
            whole.append(encoder(given[0]).hidden * given[0].attention_mask[:, :, None])
        torch.testing.assert_close(whole[-1], whole[0], rtol=1e-4, atol=1e-5)
    taken: dict[int, list[float]] = {groups: [] for groups in GROUPS}
    for _ in range(options.rounds):
        for groups, rounds in taken.items():
            rounds.append(seconds(encoder, given, groups))
    one = median(taken[1])
    positions = sum(text.input_ids.numel() for text in given)
    full = sum(int(text.attention_mask.sum()) for text in given) / positions
    for groups, rounds in taken.items():
        padded = sum(rows * length for text in given for rows, length in text.groups(groups)) / positions
        print(f"{groups} groups: {median(rounds) / one:.2f} of the time, {padded:.2f} of the positions")
    print(f"limit: {full:.2f} of the positions hold tokens")
    saved = (1 - median(taken[4]) / one) / (1 - full)
    print(f"four groups save {saved:.0%} of what can be saved (goal {GOAL:.0%})")
    return 0 if saved >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())

"""After how many steps image encoders leave chance: plain InfoNCE on phantoms, one process, no trainer.

    python tests/benchmarks/studies/encoder_start.py SHARDS resnet_phantom@3e-3 hybrid_phantom@1e-3

Prints, for each encoder of configs/models with its learning rate, the loss and the in-batch accuracy of the
last ten steps, and the first step from which that mean stays above three times chance. Its optimiser is
AdamW with a linear warm-up of 100 steps, its images are the evaluation view: it ranks encoders, and says
nothing about a whole run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from time import process_time

import torch

from medvlp import config_files
from medvlp.data.batch import Batch
from medvlp.data.cache import open_reader
from medvlp.data.loader import evaluation_loader
from medvlp.data.text import Tokenizer
from medvlp.methods.registry import build_method, schemas

BENCHMARKS = Path(__file__).parents[3] / "configs" / "benchmarks"
BATCH, WARMUP, WINDOW = 48, 100, 10


def leaves_chance(accuracies: list[float]) -> int | None:
    """The first step from which the mean of the last ten accuracies stays above three times chance."""
    means = [fmean(accuracies[max(0, step - WINDOW) : step]) for step in range(1, len(accuracies) + 1)]
    below = [step for step, mean in enumerate(means, 1) if mean <= 3 / BATCH]
    first = (below[-1] if below else 0) + 1
    return first if first <= len(means) - WINDOW else None


def train(method: torch.nn.Module, batches: list[Batch], lr: float, steps: int, seed: int) -> list[float]:
    """The in-batch accuracies of every step."""
    optimizer = torch.optim.AdamW(method.parameters(), lr, weight_decay=0.05)
    generator, order, accuracies = torch.Generator().manual_seed(seed), [], []
    for step in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARMUP)
        output = method(batches[order.pop()])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        accuracies.append(output.terms["retrieval/top1"].item())
        if (step + 1) % WINDOW == 0:
            mean = fmean(accuracies[-WINDOW:])
            print(f"  step {step + 1} loss {output.loss.item():.3f} top1 {mean:.3f}", flush=True)
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("encoders", nargs="+", metavar="MODEL@LR")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batches", type=int, default=40, help="batches of 48 samples that are trained on")
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    batches: list[Batch] = []
    for encoder in arguments.encoders:
        model, _, lr = encoder.partition("@")
        files = [
            BENCHMARKS / "phantom.yaml",
            BENCHMARKS.parent / "models" / f"{model}.yaml",
            BENCHMARKS / "infonce.yaml",
        ]
        words = [f"data.root={arguments.shards}", "run.dir=unused", "data.workers=0", "train.threads=1"]
        config = config_files.load(files, words, schemas())
        tokenizer = Tokenizer.load(config.data.tokenizer, config.data.root)
        if not batches:
            chosen = range(arguments.batches * BATCH)
            loader = evaluation_loader(config, open_reader(config.data), tokenizer, "train", BATCH, chosen)
            batches = list(loader)
        torch.manual_seed(arguments.seed)
        method = build_method(config, tokenizer.vocab_size).train()
        start = process_time()
        accuracies = train(method, batches, float(lr), arguments.steps, arguments.seed)
        spent = (process_time() - start) / arguments.steps
        print(f"{encoder}: leaves chance at step {leaves_chance(accuracies)}, {spent:.2f} CPU seconds a step")


if __name__ == "__main__":
    main()

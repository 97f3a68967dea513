"""Cost of MeDSLIP's prototype losses against the published way: a loop over every observation and anatomy.

    python tests/benchmarks/medslip_losses.py [--batch 64] [--rounds 5] [--threads 2]

The loop is what the published code does, written from its description: prototypes as masked means in
float64 tables of the whole batch ([B, 75, 51, D] and [B, 51, 75, D]), then positive and negatives side by
side for one entry of [B, 75] and [B, 51] after the other. (All published losses together were measured at
11.8 s and 8.9 GB for a batch of 64 on two cores.) Both sides compute the same numbers (checked before
timing), from decoder outputs to the loss. Exits with 1 if the vectorised side is less than 100 times as fast
or needs more than a twentieth of the memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import _measure
import torch
import torch.nn.functional as F
from _measure import Comparison, compare
from torch import Tensor

from medvlp.methods.medslip.losses import TextProjection
from medvlp.methods.medslip.terms import prototype_contrast, sample_negatives
from shards.entities.vocabulary import ANATOMIES, OBSERVATIONS

WIDTH, TEXT, NEGATIVES = 256, 768, 7
#: Shares of the cells a report mentions as present; published data have about 6 of 3825.
PRESENT = 6 / 3825


class Stream(NamedTuple):
    """One stream's decoder outputs [B, N, width], its projection, and the other vocabulary [M, D]."""

    queries: Tensor
    projection: TextProjection
    book: Tensor
    positives: Tensor
    negatives: Tensor


class Case:
    """A batch with everything the prototype losses of both streams need."""

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        present = torch.rand(batch, len(ANATOMIES), len(OBSERVATIONS)) < PRESENT
        present[:, 0, 0] = True
        self.streams = []
        for positives in (present.transpose(1, 2).contiguous(), present):
            queries = torch.randn(*positives.shape[:2], WIDTH, requires_grad=True)
            projection = TextProjection(WIDTH, TEXT)
            book = torch.randn(positives.shape[2], TEXT) / TEXT**0.5
            negatives = sample_negatives(positives, NEGATIVES)
            self.streams.append(Stream(queries, projection, book, positives, negatives))
        self.leaves = [leaf for stream in self.streams for leaf in (stream.queries, stream.projection.weight)]

    def by_loop(self) -> Tensor:
        """As published: one cell after the other."""
        return sum(loop_loss(stream) for stream in self.streams)  # type: ignore[return-value]

    def vectorised(self) -> Tensor:
        """As the library does it."""
        losses = [
            prototype_contrast(s.projection(s.queries, s.book, False), s.positives, s.negatives)
            for s in self.streams
        ]
        return torch.stack(losses).sum()


def loop_loss(stream: Stream) -> Tensor:
    batch, count, _ = stream.positives.shape
    projected = F.linear(stream.queries, stream.projection.weight, stream.projection.bias)
    mask = stream.positives.double()[..., None].repeat(1, 1, 1, TEXT)
    prototypes = (mask * stream.book).sum(2) / mask.sum(2)
    logits = []
    for b in range(batch):
        for n in range(count):
            if stream.positives[b, n].any():
                negatives = [stream.book[int(k)] for k in stream.negatives[b, n]]
                candidates = torch.stack([prototypes[b, n].float(), *negatives])
                logits.append(candidates @ projected[b, n])
    stacked = torch.stack(logits)
    return F.cross_entropy(stacked, torch.zeros(len(stacked), dtype=torch.long, device=stacked.device))


def build(side: str, batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The pass of one side and its leaves, from a fixed seed."""
    case = Case(batch)
    run: Callable[[], Tensor] = getattr(case, side)
    return run, case.leaves


def main() -> int:
    options = _measure.options(__doc__, batch=64)
    loops, vectorised = (partial(build, side, options.batch) for side in ("by_loop", "vectorised"))
    reached = compare(
        [Comparison("prototype losses", loops, vectorised, faster=100, smaller=20)],
        f"MeDSLIP, batch of {options.batch}",
        options.rounds,
        options.threads,
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())

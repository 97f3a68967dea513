"""What a network makes of a split: losses and arrays of samples, the same numbers on any number of ranks.

The split is cut into chunks that depend on nothing but its samples. Each chunk goes through one rank as if
that were alone (contrasts see the chunk and no more), with randomness of its own, so a chunk's numbers are
the same wherever it is computed. They are collected by chunk and by sample, then summed in that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp import distributed
from medvlp.data.batch import Batch
from medvlp.data.dataset import EvaluationDataset
from medvlp.data.faults import FaultCounter
from medvlp.data.loader import EvaluationLoader
from medvlp.data.order import Positions
from medvlp.methods.base import Objective, StepOutput, is_metric
from medvlp.runs.randomness import random_state, restore_random_state, seed_weights
from shards.errors import DataError

#: What is done with a batch, without gradient: its loss and terms, and arrays [B, ...] of its samples.
Examine = Callable[[Batch], tuple[StepOutput | None, Mapping[str, Tensor]]]


@dataclass
class Predictions:
    """Arrays of the samples of a split, each sample once.

    Attributes:
        sample: [N] positions in the split, ascending.
        arrays: name -> [N, ...], the rows of `sample`.
        losses: "loss" and its terms, means over the samples that have them.
    """

    sample: NDArray[np.int64]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


def predict(
    objective: Objective,
    examine: Examine,
    dataset: EvaluationDataset,
    positions: Positions,
    batch: int,
    device: torch.device,
    seed: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> Predictions:
    """Send samples through a network; all ranks call this together and get the same.

    Modes, buffers and random generators are afterwards as they were.

    Args:
        objective: is put into evaluation mode. examine: what is done with each batch.
        dataset: the split. positions: which of its samples; corrupt ones are left out.
        batch: samples of a chunk.
        device: of the objective.
        seed: of what `examine` draws.
        alive: called before each chunk.

    Raises:
        DataError: too many samples are corrupt, of all ranks together, or there is none.
    """
    chosen = np.sort(positions).tolist()
    chunks = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
    if not chunks:
        raise DataError(f"split {dataset.split!r} has no sample to be measured")
    own, allowed = _share(len(chunks)), dataset.config.max_bad_fraction
    faults = FaultCounter(allowed, len(chosen), world_size=1)  # of all, as a single rank counts them
    loader = EvaluationLoader(
        dataset, [chunks[number] for number, _ in own], dataset.config, keeps_empty=True, faults=faults
    )
    found, corrupt = _Collected(), 0
    last: Batch | None = None
    with _undisturbed(objective), torch.no_grad():
        for (number, counts), loaded in zip(own, loader, strict=True):
            alive()
            given = last = loaded if loaded.keys else last or _readable(dataset, chunks)
            corrupt += loaded.skipped if counts else 0
            seed_weights(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
            with distributed.alone():
                output, arrays = examine(given.to(device))
            if counts and loaded.keys:
                found.add(number, given, output, arrays)
    corrupt = int(distributed.sum_on_host(torch.tensor(corrupt)))
    if corrupt > allowed * len(chosen):
        raise DataError(
            f"{corrupt} of {len(chosen)} samples of split {dataset.split!r} are corrupt, more than "
            f"data.max_bad_fraction={allowed} allows; run medvlp shards verify"
        )
    return found.gathered()


def _readable(dataset: EvaluationDataset, chunks: list[list[int]]) -> Batch:
    """The first chunk with a sample, for a rank that has met none yet and must make the others' passes."""
    found = next((batch for chunk in chunks if (batch := dataset[chunk]).keys), None)
    if found is None:
        raise DataError(f"split {dataset.split!r}: none of {sum(map(len, chunks))} samples can be read")
    return found


def _share(chunks: int) -> list[tuple[int, bool]]:
    """Numbers of this rank's chunks and whether they count: ZeRO-3 gathers weights in every pass, so a rank
    without a chunk of its own in the last round does one once more."""
    rank, ranks = distributed.rank(), distributed.world_size()
    rounds = range(-(-chunks // ranks))
    return [(number, True) if (number := turn * ranks + rank) < chunks else (0, False) for turn in rounds]


class _Collected:
    """Of this rank: number, samples and losses of each chunk, and the arrays of its samples."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, int, dict[str, float]]] = []
        self._arrays: dict[str, list[Tensor]] = {}

    def add(self, number: int, batch: Batch, output: StepOutput | None, arrays: Mapping[str, Tensor]) -> None:
        """Take in what a chunk gave."""
        named = {} if output is None else output.named
        values = {name: float(value) for name, value in named.items()}
        values = {name: x for name, x in values.items() if not (is_metric(name) and math.isnan(x))}
        self._losses.append((number, len(batch.keys), values))
        for name, value in {"": batch.sample, **arrays}.items():
            # A byte: gloo carries no booleans. A copy: what is a view of a batch would keep its images.
            kind = torch.uint8 if value.dtype == torch.bool else value.dtype
            value = value.detach().to("cpu", kind, copy=True)
            self._arrays.setdefault(name, []).append(value.contiguous())

    def gathered(self) -> Predictions:
        """Of all ranks; a collective."""
        own = {name: torch.cat(parts) for name, parts in self._arrays.items()}
        told = distributed.gather_objects(
            [
                sorted({name for _, _, values in self._losses for name in values}),
                {name: [str(a.dtype), list(a.shape[1:])] for name, a in own.items()},
            ]
        )
        names = sorted({name for known, _ in told for name in known})
        layout = max((of for _, of in told), key=len)  # a rank without a sample does not know it
        arrays = {}
        for name, (kind, shape) in sorted(layout.items()):
            dtype = getattr(torch, kind.removeprefix("torch."))
            part = own.get(name, torch.zeros((0, *shape), dtype=dtype))
            whole = distributed.gather_on_host(part.float() if dtype == torch.bfloat16 else part)
            arrays[name] = whole.numpy()
        sample = arrays.pop("")
        order = np.argsort(sample, kind="stable")
        arrays = {name: a[order] for name, a in arrays.items()}
        return Predictions(sample[order], arrays, self._means(names))

    def _means(self, names: list[str]) -> dict[str, float]:
        """Of all ranks, over the samples that have the loss: a chunk of one may have fewer of them."""
        rows = torch.zeros((len(self._losses), 1 + 2 * len(names)), dtype=torch.float64)
        for row, (number, samples, values) in zip(rows, self._losses, strict=True):
            row[0] = number
            for column, name in enumerate(names):
                if name in values:
                    row[1 + 2 * column], row[2 + 2 * column] = samples, values[name]
        every = distributed.gather_on_host(rows).numpy()
        every = every[np.argsort(every[:, 0])]
        weights, found = every[:, 1::2], every[:, 2::2]
        shares = weights / weights.sum(0)
        return {name: float(shares[:, column] @ found[:, column]) for column, name in enumerate(names)}


@contextmanager
def _undisturbed(objective: Objective) -> Iterator[None]:
    """Evaluation mode; afterwards modes, buffers and random generators as before."""
    modes = {part: part.training for part in objective.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    random = random_state()
    try:
        objective.eval()
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        restore_random_state(random)

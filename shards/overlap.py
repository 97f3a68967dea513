"""What two datasets, or the splits of one, have in common: patients, studies, pictures, reports."""

import csv
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.atomic import atomic_file
from shards.fingerprints import COARSE_BITS, FINE_BITS, Fingerprints, fingerprints
from shards.progress import tracked
from shards.reader import ShardReader
from shards.workers import run_tasks

#: What may be shared, the surest sign last.
KINDS = ("report", "patient", "study", "similar image", "same image")
#: Pairs compared at a time: [rows, columns], 8 bytes each.
_ROWS, _COLUMNS = 128, 1 << 16

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Common:
    """What one split of A and one of B share in one respect.

    Attributes:
        kind: one of `KINDS`.
        split, other_split: the split of A, that of B.
        samples: int64 [N] positions of A's samples that B has too, rising.
        others: int64 [N] for each of them the position of one in B: the most alike, else the first.
        partners: int64 [N] how many B has of each.
        bits: int64 [N] differing bits of 256, of similar images; else 0.
        other_samples: how many samples of B take part.
    """

    kind: str
    split: str
    other_split: str
    samples: Positions
    others: Positions
    partners: Positions
    bits: Positions
    other_samples: int


def overlap(a: Path, b: Path | None = None, workers: int = 1) -> list[Common]:
    """Everything that two datasets share, or different splits of `a` where there is no `b`.

    Ids are compared as they are stored: those of different archives may be equal by chance, and hashed ones
    only fit those of the same key. Images are compared as they are stored too; a similar one is a copy at
    another size or quality (see `shards.fingerprints`). Only what is shared is listed, by kind.
    Time grows with the product of the numbers of samples: some three seconds for 20,000 x 20,000 on one core.

    Raises:
        DataError: a dataset cannot be read.
    """
    first = fingerprints(a, workers)
    second = first if b is None else fingerprints(b, workers)
    pairs = itertools.combinations(first, 2) if b is None else itertools.product(first, second)
    found = []
    for split, other in pairs:
        ours, theirs = first[split], second[other]
        kept: list[Common] = [
            _equal(kind, column, split, other, ours, theirs)
            for kind, column in zip(KINDS[:3], ("report", "patient", "study"), strict=True)
        ]
        same = _equal(KINDS[4], "pixels", split, other, ours, theirs)
        kept += [_similar(split, other, ours, theirs, same.samples, workers), same]
        found += [common for common in kept if len(common.samples)]
    return sorted(found, key=lambda common: KINDS.index(common.kind))


def write_pairs(path: Path, found: list[Common], a: Path, b: Path | None = None) -> None:
    """A CSV with one line for each sample of A and kind: splits and keys, number of partners, bits. No ids.

    Raises:
        DataError: the file cannot be written.
    """
    ours = ShardReader(a)
    theirs = ours if b is None else ShardReader(b)

    def lines() -> Iterator[list[str | int]]:
        for common in found:
            for i, j, n, bits in zip(
                common.samples, common.others, common.partners, common.bits, strict=True
            ):
                key, other = ours.key(common.split, int(i)), theirs.key(common.other_split, int(j))
                yield [common.kind, common.split, key, common.other_split, other, int(n), int(bits)]

    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text)
        writer.writerow(["shared", "split", "key", "other_split", "other_key", "others", "bits_of_256"])
        writer.writerows(lines())
        text.detach()


def shared_patients(found: list[Common], a: Path) -> list[str]:
    """Ids of A's patients of whom B has a patient id, a study id or an image; equal reports do not count."""
    reader = ShardReader(a)
    samples = {(common.split, int(i)) for common in found if common.kind != "report" for i in common.samples}
    return sorted({reader.metadata(split, i)["patient_id"] for split, i in samples})


def _equal(
    kind: str, column: str, split: str, other: str, ours: Fingerprints, theirs: Fingerprints
) -> Common:
    """Samples whose `column` is equal; 0 equals nothing."""
    order = np.argsort(theirs[column], kind="stable")
    values = theirs[column][order]
    start = np.searchsorted(values, ours[column], "left")
    partners = np.searchsorted(values, ours[column], "right") - start
    samples = np.flatnonzero((partners > 0) & (ours[column] != 0))
    in_both = np.isin(theirs[column], ours[column]) & (theirs[column] != 0)
    bits = np.zeros(len(samples), np.int64)
    others = order[start[samples]]
    return Common(kind, split, other, samples, others, partners[samples], bits, int(in_both.sum()))


def _similar(
    split: str, other: str, ours: Fingerprints, theirs: Fingerprints, same: Positions, workers: int
) -> Common:
    """Samples whose images look alike, without those (`same`) of equal pixels."""
    asked = np.setdiff1d(np.arange(len(ours)), same)
    blocks = [asked[start : start + _ROWS] for start in range(0, len(asked), _ROWS)] if len(theirs) else []
    # Starting processes is worth it only where each has seconds of work.
    workers = workers if len(asked) * len(theirs) > 1e9 else 1
    compared = run_tasks(_similar_rows, (ours, theirs), blocks, workers)
    parts = list(tracked(compared, f"comparing images of {split} and {other}", len(blocks)))
    rows, columns, bits = np.concatenate([np.zeros((3, 0), np.int64), *parts], axis=1)
    order = np.lexsort((columns, bits, rows))  # the most alike of each row first
    samples, first, partners = np.unique(rows[order], return_index=True, return_counts=True)
    best = order[first]
    return Common(
        KINDS[3], split, other, samples, columns[best], partners, bits[best], len(np.unique(columns))
    )


def _similar_rows(shared: tuple[Fingerprints, Fingerprints], rows: Positions) -> Positions:
    """int64 [3, pairs] of images that are alike: row of ours, row of theirs, differing bits of 256."""
    ours, theirs = shared
    coarse, fine = ours["coarse"][rows], ours["fine"][rows]
    found = []
    for start in range(0, len(theirs), _COLUMNS):
        block = theirs[start : start + _COLUMNS]
        near = np.bitwise_count(coarse[:, None] ^ block["coarse"][None]) <= COARSE_BITS
        i, j = np.nonzero(near)
        bits = np.bitwise_count(fine[i] ^ block["fine"][j]).sum(1, dtype=np.int64)
        alike = bits <= FINE_BITS
        found.append(np.stack([rows[i[alike]], j[alike] + start, bits[alike]]))
    return np.concatenate(found, axis=1)

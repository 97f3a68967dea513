"""A random choice among the rows of all ranks that does not depend on which rank holds which row."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp import distributed

#: Bits of a key that one histogram over ranks tells apart.
_DIGIT = 16


def row_keys(seed: int, *columns: Tensor) -> Tensor:
    """Pseudo-random numbers of rows, from what names a row alone.

    Args:
        seed: another seed gives another order of the same rows.
        columns: [n] integers each; together they tell rows apart.

    Returns:
        [n] int64 in [0, 2^63).
    """
    state = np.full(len(columns[0]), mixed_seed(seed), np.uint64)
    for column in columns:
        state = _scramble(state ^ column.cpu().numpy().astype(np.int64).view(np.uint64))
    return torch.from_numpy((state >> np.uint64(1)).view(np.int64))


def mixed_seed(*numbers: int) -> int:
    """One 64-bit seed from several numbers of at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014); numpy has no hash of whole arrays."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def rank_order(count: int) -> Tensor:
    """[count] int64 positions of this rank's rows when those of lower ranks come first; a collective."""
    counts = torch.zeros(distributed.world_size(), dtype=torch.int64)
    counts[distributed.rank()] = count
    first = distributed.sum_on_host(counts)[: distributed.rank()].sum()
    return first + torch.arange(count)


def smallest(keys: Tensor, limit: int) -> Tensor:
    """Which of this rank's rows are among the `limit` with the smallest keys of all ranks; a collective.

    Two all-reduced histograms find the threshold, whatever the number of rows; only rows that agree with it
    in 32 bits (one in 4 billion) come in beyond the limit.

    Args:
        keys: [n] int64 from `row_keys`.
        limit: at least 1; all rows are chosen when there are no more.

    Returns:
        [n] bool.
    """
    prefix = 0
    for shift in (63 - _DIGIT, 63 - 2 * _DIGIT):
        digits = (keys[keys >> (shift + _DIGIT) == prefix] >> shift) & (2**_DIGIT - 1)
        counts = distributed.sum_on_host(torch.bincount(digits, minlength=2**_DIGIT)).cumsum(0)
        digit = min(int(torch.searchsorted(counts, limit)), 2**_DIGIT - 1)
        limit -= int(counts[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
    return keys >> (63 - 2 * _DIGIT) <= prefix


def gather_in_order(rows: Tensor, keys: Tensor) -> Tensor:
    """[n, ...] rows of each rank -> [N, ...] all of them by rising key, on every rank; a collective."""
    order = distributed.gather_on_host(keys).argsort(stable=True)
    return distributed.gather_on_host(rows)[order]

"""Retrieval metrics: ranks with duplicates, recall and precision among the first K, and what chance gives."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import NotFiniteError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Similarities held at a time (32 MB of float64).
_CELLS = 1 << 22


def _blocks(queries: NDArray[Any], gallery: NDArray[Any]) -> Iterator[tuple[slice, Floats]]:
    """Yield (slice of queries, similarities [b, M]); in float64, so that block sizes do not change ranks."""
    gallery = gallery.astype(np.float64)
    size = max(1, _CELLS // max(len(gallery), 1))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        similarity = queries[rows].astype(np.float64) @ gallery.T
        if not np.isfinite(similarity).all():
            raise NotFiniteError("embeddings")
        yield rows, similarity


def best_ranks(
    queries: NDArray[Any], gallery: NDArray[Any], query_group: NDArray[Any], gallery_group: NDArray[Any]
) -> Integers:
    """Rank (from 1) of the best correct candidate of each query.

    A candidate is correct when its group equals the query's (the same report text). Wrong candidates with
    the same similarity stand before the correct one: a collapsed model, to which all is alike, finds nothing.

    Args:
        queries: [N, D]; gallery: [M, D]; similarity is the inner product.
        query_group: [N] and gallery_group: [M] group of each; every query needs a correct candidate.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    for rows, similarity in _blocks(queries, gallery):
        correct = query_group[rows, None] == gallery_group[None, :]
        if not correct.any(axis=1).all():
            raise ValueError("a query has no correct candidate in the gallery")
        best = np.where(correct, similarity, -np.inf).max(axis=1, keepdims=True)
        ranks[rows] = 1 + ((similarity >= best) & ~correct).sum(axis=1)
    return ranks


def average_precision(queries: NDArray[Any], gallery: NDArray[Any], relevant: NDArray[np.bool_]) -> Floats:
    """[N] average precision of each query: the mean over its relevant candidates of the precision there.

    Candidates of equal similarity all stand at the last of their places.

    Args:
        queries: [N, D]; gallery: [M, D]; similarity is the inner product.
        relevant: [N, M] whether a candidate is relevant to a query; every query needs one.
    """
    from sklearn.metrics import label_ranking_average_precision_score

    if not relevant.any(axis=1).all():
        raise ValueError("a query has no relevant candidate in the gallery")
    found = np.empty(len(queries))
    for rows, similarity in _blocks(queries, gallery):
        for row, scores in zip(range(*rows.indices(len(queries))), similarity, strict=True):
            found[row] = label_ranking_average_precision_score(relevant[[row]], scores[None])
    return found


def chance_average_precision(relevant: NDArray[Any], candidates: int) -> Floats:
    """Expected average precision of a random order of M candidates, of which [N] counts are relevant.

    With R of them relevant, place k holds a relevant one with R / M, and each place before it does so with
    q = (R - 1) / (M - 1) then; the mean over k of (1 + (k - 1) q) / k is q + (1 - q) H_M / M.
    """
    harmonic = float((1 / np.arange(1, candidates + 1)).sum())
    others: Floats = (relevant - 1) / max(candidates - 1, 1)
    return others + (1 - others) * harmonic / candidates


def precision_at(queries: NDArray[Any], gallery: NDArray[Any], relevant: NDArray[np.bool_], k: int) -> Floats:
    """[N] share of relevant candidates among each query's K most similar ones.

    Where similarities tie at the border of the first K, the places left are shared evenly (the expected
    value over random orders).

    Args:
        queries: [N, D]; gallery: [M, D] with M >= k.
        relevant: [M] whether a candidate is relevant (to all queries alike).

    Raises:
        ValueError: the gallery holds fewer than `k` candidates.
    """
    if len(gallery) < k:
        raise ValueError(f"precision at {k} needs at least {k} candidates, there are {len(gallery)}")
    precision = np.empty(len(queries))
    for rows, similarity in _blocks(queries, gallery):
        border = np.partition(similarity, len(gallery) - k, axis=1)[:, [len(gallery) - k]]
        above, tied = similarity > border, similarity == border
        places = k - above.sum(axis=1)
        share = (tied & relevant).sum(axis=1) / tied.sum(axis=1)
        precision[rows] = ((above & relevant).sum(axis=1) + places * share) / k
    return precision


def recall_at(ranks: Integers, k: int, weights: Floats) -> Floats:
    """[R] weighted share of queries with rank <= k; weights [R, N]."""
    recall: Floats = weights @ (ranks <= k).astype(float) / weights.sum(axis=1)
    return recall


def median_rank(ranks: Integers, weights: Floats) -> Floats:
    """[R] weighted lower median of the ranks; weights [R, N]."""
    order = np.argsort(ranks, kind="stable")
    cumulative = np.cumsum(weights[:, order], axis=1)
    middle = (cumulative >= cumulative[:, -1:] / 2).argmax(axis=1)
    medians: Floats = ranks[order][middle].astype(np.float64)
    return medians


def chance_miss(correct: NDArray[Any], candidates: int, k: int) -> float:
    """Mean probability that a random order has no correct candidate among its first k.

    `correct` [N] is each query's number of correct candidates among `candidates`:
    the product over the first k places of (candidates - correct - place) / (candidates - place).
    """
    counts, times = np.unique(correct, return_counts=True)
    place = np.arange(min(k, candidates))
    miss = np.clip(candidates - counts[:, None] - place, 0, None) / (candidates - place)
    return float((miss.prod(axis=1) * times).sum() / times.sum())


def chance_median_rank(correct: NDArray[Any], candidates: int) -> int:
    """Median rank of the best correct candidate in a random order."""
    low, high = 1, candidates
    while low < high:
        middle = (low + high) // 2
        if chance_miss(correct, candidates, middle) <= 0.5:
            high = middle
        else:
            low = middle + 1
    return low

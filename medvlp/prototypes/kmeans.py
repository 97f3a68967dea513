"""Spherical k-means over the rows of all ranks; the only file that imports FAISS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from medvlp import distributed
from medvlp.losses.normalise import unit_norm
from shards.errors import MedvlpError

#: Rows for each cluster that the start is drawn from.
START_ROWS = 20
#: Length of the push that takes the two halves of a split cluster apart.
SPLIT = 0.05


class TooFewRowsError(MedvlpError, ValueError):
    """Fewer embeddings than clusters."""


@dataclass(frozen=True)
class Clusters:
    """Result of k-means, the same on every rank.

    Attributes:
        centroids: [K, D] float32 unit vectors. counts: [K] float32, rows of each cluster.
        similarity: mean cosine between a row and its centroid, in [-1, 1].
        revived: clusters that were without rows and got half of another, over all iterations.
    """

    centroids: Tensor
    counts: Tensor
    similarity: float
    revived: int


def spherical_kmeans(
    rows: Tensor,
    count: int,
    iterations: int,
    seed: int,
    version: int = 0,
    start: Tensor | None = None,
    positions: Tensor | None = None,
) -> Clusters:
    """Cluster unit vectors by cosine similarity; a collective, every rank calls it.

    FAISS assigns each rank's own rows; only sums and counts travel. The result depends on the rows and
    their positions, not on how they are divided over ranks (sums are float64: to about 1e-6).

    Args:
        rows: [n, D] unit-norm rows of this rank on the CPU; n may differ between ranks and be 0.
        count: number of clusters K.
        iterations: rounds of assignment and update.
        seed, version: randomness of the start and of splits.
        start: [K, D] unit vectors to start from (cluster ids keep their meaning); None: k-means++ on a
            sample of the rows of all ranks.
        positions: [n] int64 place of each row among the N rows of all ranks (0 .. N-1, each once); None:
            the rows of rank 0 first, then those of rank 1, ...

    Raises:
        TooFewRowsError: fewer than K rows over all ranks.
    """
    rows = rows.detach().float().contiguous()
    total = int(distributed.sum_on_host(torch.tensor(rows.shape[0])).item())
    if total < count:
        raise TooFewRowsError(
            f"k-means into {count} prototypes needs as many embeddings and has {total}: "
            "lower method.prototypes or raise prototypes.init_samples"
        )
    if start is None:
        positions = _rank_order(rows.shape[0]) if positions is None else positions
        centroids = _start(rows, positions, count, total, seed)
    else:
        centroids = unit_norm(start).float().cpu()
    revived = 0
    for iteration in range(iterations):
        sums, counts, _ = _assign(rows, centroids)
        # A cluster whose rows cancel out keeps its direction.
        means = torch.where(sums.norm(dim=1, keepdim=True) > 1e-9, sums, centroids.double())
        generator = torch.Generator().manual_seed(_mix(seed, version, iteration))
        centroids, split = _split_largest(unit_norm(means), counts, generator)
        revived += split
    _, counts, similarity = _assign(rows, centroids)
    return Clusters(centroids, counts.float(), similarity, revived)


def _rank_order(count: int) -> Tensor:
    """Positions of this rank's rows when those of lower ranks come first."""
    counts = torch.zeros(distributed.world_size(), dtype=torch.int64)
    counts[distributed.rank()] = count
    first = distributed.sum_on_host(counts)[: distributed.rank()].sum()
    return first + torch.arange(count)


def _start(rows: Tensor, positions: Tensor, count: int, total: int, seed: int) -> Tensor:
    """k-means++ (scikit-learn's) on a random sample of all ranks' rows; the same on every rank."""
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(total)[: START_ROWS * count])
    place = torch.full((total,), -1)
    place[chosen] = torch.arange(len(chosen))
    own = place[positions]
    sample = torch.zeros(len(chosen), rows.shape[1])
    sample[own[own >= 0]] = rows[own >= 0]
    sample = distributed.sum_on_host(sample)
    centroids, _ = kmeans_plusplus(sample.double().numpy(), count, random_state=seed)
    # Ranks on different machines may round differently.
    return distributed.broadcast_on_host(torch.from_numpy(centroids).float().contiguous())


def _assign(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, float]:
    """Sums [K, D] and counts [K] (float64) of each cluster over all ranks, and the mean similarity."""
    import faiss

    count, width = centroids.shape
    packed = torch.zeros(count, width + 2, dtype=torch.float64)
    if rows.shape[0]:
        index = faiss.IndexFlatIP(width)
        index.add(centroids.float().numpy())
        similarity, nearest = index.search(rows.numpy(), 1)
        values = torch.cat([rows, torch.ones(rows.shape[0], 1), torch.from_numpy(similarity)], 1)
        packed.index_add_(0, torch.from_numpy(nearest[:, 0]), values.double())
    packed = distributed.sum_on_host(packed)
    sums, counts = packed[:, :width], packed[:, width]
    return sums, counts, float(packed[:, width + 1].sum() / counts.sum())


def _split_largest(centroids: Tensor, counts: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """Give every cluster without rows half of the largest one; returns float32 centroids and how many."""
    centroids, counts = centroids.clone(), counts.clone()
    empty = (counts == 0).nonzero()[:, 0].tolist()
    for cluster in empty:
        largest = int(counts.argmax())
        push = torch.randn(centroids.shape[1], generator=generator, dtype=centroids.dtype)
        push = SPLIT * push / push.norm()
        source = centroids[largest].clone()
        centroids[cluster], centroids[largest] = source + push, source - push
        counts[cluster] = counts[largest] = counts[largest] / 2
    return unit_norm(centroids).float(), len(empty)


def _mix(seed: int, version: int, iteration: int) -> int:
    return int(np.random.SeedSequence([seed, version, iteration]).generate_state(1)[0])

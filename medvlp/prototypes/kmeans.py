"""Spherical k-means over the rows of all ranks: FAISS assigns each rank's own, sums and counts travel."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.sampling import mixed_seed, rank_order, row_keys
from medvlp.prototypes.search import CentroidSearch
from medvlp.prototypes.seeding import first_centroids
from shards.errors import MedvlpError
from shards.progress import tracked

#: Length of the push that takes the two halves of a split cluster apart.
SPLIT = 0.05
#: Rows added up at once: float64 copies that stay in the cache.
_BLOCK = 4096


class TooFewRowsError(MedvlpError, ValueError):
    """Fewer embeddings than clusters."""


@dataclass(frozen=True)
class Clusters:
    """How the rows of all ranks lie around centroids. Everything but `nearest` is the same on every rank.

    Attributes:
        centroids: [K, D] float32 unit vectors. counts: [K] float32, rows nearest to each.
        similarity: mean cosine between a row and its centroid, in [-1, 1].
        distances: [K] float64, sum of the Euclidean distances between a centroid and its rows.
        nearest: [n] int64, cluster of each row of this rank.
        revived: clusters that were without rows and got half of another, over all iterations.
    """

    centroids: Tensor
    counts: Tensor
    similarity: float
    distances: Tensor
    nearest: Tensor
    revived: int = 0


@dataclass(frozen=True)
class Anchors:
    """What holds the first clusters: [A, D] unit vectors, and how far (in [0, 1]) they are drawn there."""

    directions: Tensor
    pull: float

    def hold(self, centroids: Tensor) -> Tensor:
        """[K, D] unit vectors with the first A drawn to the anchors (on them with a pull of 1)."""
        count = len(self.directions)
        if self.pull == 1.0:
            drawn = self.directions
        else:
            drawn = unit_norm(torch.lerp(centroids[:count], self.directions.to(centroids), self.pull))
        return torch.cat([drawn.to(centroids), centroids[count:]])


def spherical_kmeans(
    rows: Tensor,
    count: int,
    config: PrototypesConfig,
    seed: int,
    version: int = 0,
    keys: Tensor | None = None,
    start: Tensor | None = None,
) -> Clusters:
    """Cluster unit vectors by cosine similarity; a collective, every rank calls it.

    The result depends on the rows and their keys, not on how they are divided over ranks (sums are float64:
    to about 1e-6).

    Args:
        rows: [n, D] unit-norm float32 rows of this rank on the CPU; n may differ between ranks and be 0.
        count: number of clusters K.
        config: the `prototypes` section: iterations, start, ivf_above, device, worker_threads.
        seed, version: randomness of the start and of splits.
        keys: [n] int64 that order the rows of all ranks for the choice of the start; None: by rank and row.
        start: [K, D] unit vectors to start from, so that ids keep their meaning; None: as configured.

    Raises:
        TooFewRowsError: fewer than K rows over all ranks.
        ValueError: rows of some rank are not finite.
    """
    rows = rows.detach().float().contiguous()
    unusable = int((~torch.linalg.vector_norm(rows, dim=1).isfinite()).sum())
    total, unusable = distributed.sum_on_host(torch.tensor([rows.shape[0], unusable])).tolist()
    if unusable:
        raise ValueError(f"{unusable} of {total} embeddings are NaN or infinite: k-means has no use for them")
    if total < count:
        raise TooFewRowsError(
            f"k-means into {count} prototypes needs as many embeddings and has {total}: "
            "lower method.prototypes or raise prototypes.init_samples"
        )
    if start is None:
        keys = row_keys(seed, rank_order(len(rows))) if keys is None else keys
        start = first_centroids(rows, keys, count, config.start, seed)
    search = build_search(len(rows), count, rows.shape[1], config)
    rounds: Iterable[int] = range(config.iterations)
    if distributed.is_main():
        rounds = tracked(rounds, f"k-means of {total:,} rows", config.iterations)
    clustering = improve(rows, unit_norm(start).float().cpu(), search, rounds, seed, version)
    return describe(rows, clustering.centroids, search, clustering.revived)


def build_search(rows: int, count: int, width: int, config: PrototypesConfig) -> CentroidSearch:
    """The search for `rows` of this rank; on a CPU it has `prototypes.worker_threads`, by default torch's."""
    return CentroidSearch(count, width, config, rows, config.worker_threads or torch.get_num_threads())


@dataclass(frozen=True)
class Improved:
    """Result of `improve`: [K, D] centroids, clusters revived, and the [n] clusters the rows began in."""

    centroids: Tensor
    revived: int
    first: Tensor


def improve(
    rows: Tensor,
    centroids: Tensor,
    search: CentroidSearch,
    rounds: Iterable[int],
    seed: int,
    version: int = 0,
    anchors: Anchors | None = None,
) -> Improved:
    """Rounds (0, 1, ...) of assignment and update, from [K, D] float32 unit vectors; a collective.

    Clusters without rows get half of the largest, but never an anchored one: that waits for its rows.
    """
    count, width = centroids.shape
    local, first = ClusterSums(rows, count), torch.zeros(0, dtype=torch.int64)
    revived = 0
    for iteration in rounds:
        _, nearest = search(rows.numpy(), centroids.numpy())
        local.update(nearest)
        if iteration == 0:
            first = torch.from_numpy(nearest)
        packed = distributed.sum_on_host(torch.from_numpy(local.packed))
        sums, counts = packed[:, :width], packed[:, width]
        # A cluster whose rows cancel out keeps its direction.
        means = torch.where(sums.norm(dim=1, keepdim=True) > 1e-9, sums, centroids.double())
        generator = torch.Generator().manual_seed(mixed_seed(seed, version, iteration))
        held = 0 if anchors is None else len(anchors.directions)
        moved, split = _split_largest(unit_norm(means), counts, generator, held)
        centroids = unit_norm(moved if anchors is None else anchors.hold(moved)).float()
        revived += split
    return Improved(centroids, revived, first)


def describe(rows: Tensor, centroids: Tensor, search: CentroidSearch, revived: int = 0) -> Clusters:
    """Assign the rows of all ranks to centroids and say how they lie; a collective."""
    similarity, nearest = search(rows.numpy(), centroids.numpy())
    count = len(centroids)
    distances = np.sqrt(np.maximum(2 - 2 * similarity.astype(np.float64), 0))
    weights = (np.ones(len(rows)), similarity, distances)
    # Without rows bincount gives integers, whatever the weights.
    local = np.stack([np.bincount(nearest, weight, count) for weight in weights]).astype(np.float64)
    counts, similarities, distances = distributed.sum_on_host(torch.from_numpy(local))
    mean = float(similarities.sum() / counts.sum())
    return Clusters(centroids, counts.float(), mean, distances, torch.from_numpy(nearest), revived)


class ClusterSums:
    """Sum and number of this rank's rows by cluster, in float64, kept up to date as rows move.

    Only rows that changed their cluster are touched; adding and taking away leaves errors of 1e-16.

    Attributes:
        packed: [K, D + 1] float64, sums and counts.

    Args:
        rows: [n, D] float32. count: K.
    """

    def __init__(self, rows: Tensor, count: int) -> None:
        self._rows: NDArray[np.float32] = rows.numpy()
        self._nearest: NDArray[np.int64] | None = None
        self._values: NDArray[np.float64] = np.ones((_BLOCK, rows.shape[1] + 1))
        self.packed: NDArray[np.float64] = np.zeros((count, rows.shape[1] + 1))

    def update(self, nearest: NDArray[np.int64]) -> None:
        """Take over the [n] clusters of the rows."""
        if self._nearest is None:
            self._add(self._rows, nearest, None)
        else:
            moved = np.flatnonzero(nearest != self._nearest)
            if 2 * len(moved) > len(nearest):  # as many additions, without the copy of the rows
                self.packed[:] = 0
                self._add(self._rows, nearest, None)
            else:
                self._add(self._rows[moved], nearest[moved], self._nearest[moved])
        self._nearest = nearest

    def _add(self, rows: NDArray[np.float32], to: NDArray[np.int64], away: NDArray[np.int64] | None) -> None:
        """A product with a sparse [K, n] matrix: in float64 twice as fast as torch's `index_add_`."""
        from scipy.sparse import csc_matrix

        width = self._rows.shape[1]
        for begin in range(0, len(rows), _BLOCK):
            part = slice(begin, begin + _BLOCK)
            values = self._values[: len(rows[part])]
            values[:, :width] = rows[part]
            columns, signs = [to[part]], [1.0]
            if away is not None:
                columns, signs = [to[part], away[part]], [1.0, -1.0]
            places = np.arange(len(values) + 1) * len(columns)
            entries = (np.tile(signs, len(values)), np.stack(columns, 1).ravel(), places)
            self.packed += csc_matrix(entries, shape=(len(self.packed), len(values))) @ values


def _split_largest(
    centroids: Tensor, counts: Tensor, generator: torch.Generator, held: int = 0
) -> tuple[Tensor, int]:
    """Give every cluster without rows, from number `held` on, half of the largest; centroids and how many."""
    centroids, counts = centroids.clone(), counts.clone()
    empty = [cluster for cluster in (counts == 0).nonzero()[:, 0].tolist() if cluster >= held]
    for cluster in empty:
        largest = int(counts.argmax())
        push = torch.randn(centroids.shape[1], generator=generator, dtype=centroids.dtype)
        push = SPLIT * push / push.norm()
        source = centroids[largest].clone()
        centroids[cluster], centroids[largest] = source + push, source - push
        counts[cluster] = counts[largest] = counts[largest] / 2
    return unit_norm(centroids), len(empty)

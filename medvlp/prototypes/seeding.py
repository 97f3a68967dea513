"""First centroids of k-means over the rows of all ranks."""

import torch
from torch import Tensor

from medvlp import distributed
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.sampling import gather_in_order, smallest

#: Rows for each cluster that k-means++ draws from, at least and at most; rows times clusters is bounded.
_ROWS, _COMPARISONS = (3, 20), 2**25
#: Clusters from which k-means++ tries one candidate for each instead of scikit-learn's 2 + ln K.
_SINGLE_TRIAL = 2048


def first_centroids(
    rows: Tensor, keys: Tensor, count: int, start: str, seed: int, anchors: Tensor | None = None
) -> Tensor:
    """Choose [K, D] unit vectors to start from, the same on every rank; a collective.

    Args:
        rows: [n, D] unit-norm rows of this rank. keys: [n] from `row_keys`.
        count: K, no more than all ranks' rows.
        start: "k-means++" (scikit-learn's, by rank 0, on the rows with the smallest keys: up to 20 for each
            cluster, fewer from about 1,300 clusters on), or "farthest_first" (every next centroid is the row,
            of all, that is least similar to those before it: Gonzalez 1985; K small collectives).
        seed: of k-means++; farthest-first begins with the row of the smallest key.
        anchors: [A, D] unit vectors that are the first centroids.
    """
    if start == "farthest_first":
        centroids = _farthest_first(rows, keys, count, anchors)
    else:
        chosen = smallest(keys, count * min(max(_COMPARISONS // count**2, _ROWS[0]), _ROWS[1]))
        sample = gather_in_order(rows[chosen], keys[chosen])
        centroids = torch.empty(count, rows.shape[1])
        if distributed.is_main():
            centroids = _plus_plus(sample, count, seed)
    if anchors is not None:
        centroids[: len(anchors)] = anchors
    return distributed.broadcast_on_host(unit_norm(centroids).float().contiguous())


def _plus_plus(sample: Tensor, count: int, seed: int) -> Tensor:
    from sklearn.cluster import kmeans_plusplus  # here: takes a second to import

    trials = 1 if count > _SINGLE_TRIAL else None
    centroids, _ = kmeans_plusplus(
        sample.double().numpy(), count, random_state=seed % 2**32, n_local_trials=trials
    )
    return torch.from_numpy(centroids).float()


def _farthest_first(rows: Tensor, keys: Tensor, count: int, anchors: Tensor | None) -> Tensor:
    """Written by hand: neither FAISS nor scikit-learn has it. A sample would miss what is rare."""
    if anchors is None:
        chosen = smallest(keys, 1)
        known = gather_in_order(rows[chosen], keys[chosen])[:1]
    else:
        known = anchors
    centroids = torch.cat([known, torch.empty(count - len(known), rows.shape[1])])
    nearest = (rows @ known.T).amax(1)
    for cluster in range(len(known), count):
        candidate = torch.full((1, rows.shape[1] + 1), torch.inf)
        if len(rows):
            farthest = int(nearest.argmin())
            candidate[0, 0], candidate[0, 1:] = nearest[farthest], rows[farthest]
        candidates = distributed.gather_on_host(candidate)
        centroids[cluster] = candidates[int(candidates[:, 0].argmin()), 1:]
        torch.maximum(nearest, rows @ centroids[cluster], out=nearest)
    return centroids

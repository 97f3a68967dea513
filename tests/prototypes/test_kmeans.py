"""Distributed spherical k-means: quality, equality over ranks, dead clusters, corners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.distributed import rank, world_size
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.kmeans import TooFewRowsError, spherical_kmeans


def mixture(clusters: int, each: int, width: int = 8, spread: float = 0.05, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = unit_norm(torch.randn(clusters, width, generator=generator))
    rows = centers.repeat_interleave(each, 0)
    rows = rows + spread * torch.randn(rows.shape, generator=generator)
    return unit_norm(rows)[torch.randperm(len(rows), generator=generator)]


def test_finds_separate_clusters() -> None:
    rows = mixture(6, 40)
    clusters = spherical_kmeans(rows, 6, iterations=10, seed=0)
    assert sorted(clusters.counts.tolist()) == [40.0] * 6
    assert clusters.similarity > 0.97
    torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(6))


def test_more_iterations_never_fit_worse() -> None:
    rows = mixture(10, 30, spread=0.4)
    fits = [spherical_kmeans(rows, 10, n, seed=3).similarity for n in (0, 1, 3, 10)]
    assert fits == sorted(fits)
    assert fits[-1] > fits[0]


def cluster_own_rows(rows: np.ndarray, shares: list[float], start: np.ndarray | None) -> tuple:
    """k-means on this rank's contiguous part of `rows`; `shares` are the ranks' cumulative shares."""
    edges = [0, *(round(share * len(rows)) for share in shares)]
    own = torch.from_numpy(rows[edges[rank()] : edges[rank() + 1]])
    assert world_size() == len(shares)
    given_start = None if start is None else torch.from_numpy(start)
    clusters = spherical_kmeans(own, 12, iterations=8, seed=5, version=2, start=given_start)
    return clusters.centroids.numpy(), clusters.counts.numpy(), clusters.similarity, clusters.revived


@pytest.mark.dist
@pytest.mark.parametrize("warm", [False, True])
def test_the_same_on_one_two_and_four_ranks(gloo_pool, warm: bool) -> None:
    rows = mixture(9, 37, spread=0.3).numpy()
    # A warm start with equal centroids leaves most clusters empty, so that splits are compared too.
    start = np.repeat(rows[:3], 4, axis=0) if warm else None
    reference = cluster_own_rows(rows, [1.0], start)
    assert not warm or reference[3] > 0
    for shares in ([0.7, 1.0], [0.1, 0.1, 0.75, 1.0]):
        for centroids, counts, similarity, revived in gloo_pool(len(shares)).run(
            cluster_own_rows, rows, shares, start
        ):
            np.testing.assert_allclose(centroids, reference[0], atol=1e-6)
            np.testing.assert_array_equal(counts, reference[1])
            assert similarity == pytest.approx(reference[2], abs=1e-6)
            assert revived == reference[3]


def test_cluster_ids_keep_their_meaning() -> None:
    rows = mixture(5, 30)
    first = spherical_kmeans(rows, 5, 10, seed=0)
    moved = unit_norm(rows + 0.02 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    second = spherical_kmeans(moved, 5, 5, seed=0, version=1, start=first.centroids)
    assert (first.centroids * second.centroids).sum(1).min() > 0.99


def test_dead_clusters_take_half_of_the_largest() -> None:
    rows = mixture(2, 200, spread=0.3)
    start = unit_norm(torch.cat([rows[:1], -rows.mean(0, keepdim=True).repeat(3, 1)]))
    clusters = spherical_kmeans(rows, 4, 10, seed=0, start=start)
    assert clusters.revived >= 2
    assert (clusters.counts > 0).all()


def test_randomness_comes_from_seed_and_version() -> None:
    rows = mixture(2, 100, spread=0.3)
    start = rows[:1].repeat(4, 1)
    runs = [
        spherical_kmeans(rows, 4, 1, seed, version, start).centroids
        for seed, version in ((0, 1), (0, 1), (0, 2))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 20), count=st.integers(1, 6), same=st.booleans(), seed=st.integers(0, 99))
def test_any_rows_give_unit_centroids(rows: int, count: int, same: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = unit_norm(torch.randn(rows, 4, generator=generator))
    data = data[:1].repeat(rows, 1) if same else data
    if rows < count:
        with pytest.raises(TooFewRowsError, match=r"prototypes\.init_samples"):
            spherical_kmeans(data, count, 3, seed)
        return
    clusters = spherical_kmeans(data, count, 3, seed)
    torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(count))
    assert clusters.counts.sum() == rows
    assert clusters.centroids.isfinite().all()

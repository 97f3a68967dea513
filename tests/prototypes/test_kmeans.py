"""Distributed spherical k-means: quality, equality over ranks, dead clusters, corners."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import PrototypesConfig
from medvlp.distributed import rank, world_size
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.kmeans import Clusters, ClusterSums, TooFewRowsError, spherical_kmeans
from shards import progress


def mixture(clusters: int, each: int, width: int = 8, spread: float = 0.05, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = unit_norm(torch.randn(clusters, width, generator=generator))
    rows = centers.repeat_interleave(each, 0)
    rows = rows + spread * torch.randn(rows.shape, generator=generator)
    return unit_norm(rows)[torch.randperm(len(rows), generator=generator)]


def kmeans(rows: torch.Tensor, count: int, iterations: int, *seeds: int, start=None, **options) -> Clusters:
    """k-means from `start`: centroids, or the name of how to choose them."""
    if isinstance(start, str):
        options["start"], start = start, None
    config = PrototypesConfig(iterations=iterations, **options)
    return spherical_kmeans(rows, count, config, *seeds, start=start)


def test_finds_separate_clusters() -> None:
    rows = mixture(6, 40)
    clusters = kmeans(rows, 6, 10, 0)
    assert sorted(clusters.counts.tolist()) == [40.0] * 6
    assert clusters.similarity > 0.97
    torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(6))


def test_more_iterations_never_fit_worse() -> None:
    rows = mixture(10, 30, spread=0.4)
    fits = [kmeans(rows, 10, n, 3).similarity for n in (0, 1, 3, 10)]
    assert fits == sorted(fits)
    assert fits[-1] > fits[0]


def cluster_own_rows(rows: np.ndarray, shares: list[float], start: np.ndarray | None) -> tuple:
    """k-means on this rank's contiguous part of `rows`; `shares` are the ranks' cumulative shares."""
    edges = [0, *(round(share * len(rows)) for share in shares)]
    own = torch.from_numpy(rows[edges[rank()] : edges[rank() + 1]])
    assert world_size() == len(shares)
    given_start = None if start is None else torch.from_numpy(start)
    clusters = kmeans(own, 12, 8, 5, 2, start=given_start)
    return clusters.centroids.numpy(), clusters.counts.numpy(), clusters.similarity, clusters.revived


@pytest.mark.dist
@pytest.mark.parametrize("warm", [False, True])
def test_the_same_on_one_two_and_four_ranks(gloo_pool, warm: bool) -> None:
    rows = mixture(9, 37, spread=0.3).numpy()
    # A warm start with equal centroids leaves most clusters empty, so that splits are compared too.
    start = np.repeat(rows[:3], 4, axis=0) if warm else None
    reference = cluster_own_rows(rows, [1.0], start)
    assert not warm or reference[3] > 0
    for shares in ([0.7, 1.0], [0.1, 0.1, 0.75, 1.0]):  # rank 1 of 4 has no rows
        for centroids, counts, similarity, revived in gloo_pool(len(shares)).run(
            cluster_own_rows, rows, shares, start
        ):
            np.testing.assert_allclose(centroids, reference[0], atol=1e-6)
            np.testing.assert_array_equal(counts, reference[1])
            assert similarity == pytest.approx(reference[2], abs=1e-6)
            assert revived == reference[3]


def test_cluster_ids_keep_their_meaning() -> None:
    rows = mixture(5, 30)
    first = kmeans(rows, 5, 10, 0)
    moved = unit_norm(rows + 0.02 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    second = kmeans(moved, 5, 5, 0, 1, start=first.centroids)
    assert (first.centroids * second.centroids).sum(1).min() > 0.99


def test_dead_clusters_take_half_of_the_largest() -> None:
    rows = mixture(2, 200, spread=0.3)
    start = unit_norm(torch.cat([rows[:1], -rows.mean(0, keepdim=True).repeat(3, 1)]))
    clusters = kmeans(rows, 4, 10, 0, start=start)
    assert clusters.revived >= 2
    assert (clusters.counts > 0).all()


def test_randomness_comes_from_seed_and_version() -> None:
    rows = mixture(2, 100, spread=0.3)
    start = rows[:1].repeat(4, 1)
    runs = [
        kmeans(rows, 4, 1, seed, version, start=start).centroids for seed, version in ((0, 1), (0, 1), (0, 2))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@settings(max_examples=30)
@given(rows=st.integers(1, 20), count=st.integers(1, 6), same=st.booleans(), seed=st.integers(0, 99))
def test_any_rows_give_unit_centroids(rows: int, count: int, same: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = unit_norm(torch.randn(rows, 4, generator=generator))
    data = data[:1].repeat(rows, 1) if same else data
    if rows < count:
        with pytest.raises(TooFewRowsError, match=r"prototypes\.init_samples"):
            kmeans(data, count, 3, seed)
        return
    clusters = kmeans(data, count, 3, seed)
    torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(count))
    assert clusters.counts.sum() == rows
    assert clusters.centroids.isfinite().all()


def test_as_good_as_faiss() -> None:
    """Within 0.1 % of the objective of `faiss.Kmeans` on the same rows, from the same start."""
    rows = mixture(60, 50, width=32, spread=0.15, seed=4)
    start = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:60]]
    theirs = faiss.Kmeans(32, 60, niter=12, spherical=True)
    theirs.train(rows.numpy(), init_centroids=start.numpy())
    ours = kmeans(rows, 60, 12, 0, start=start)
    assert ours.similarity == pytest.approx(theirs.obj[-1] / len(rows), rel=1e-3)
    # And where no start is given, ours is not worse.
    plain = faiss.Kmeans(32, 60, niter=12, spherical=True, seed=3)
    plain.train(rows.numpy())
    assert kmeans(rows, 60, 12, 0).similarity > 0.999 * plain.obj[-1] / len(rows)


def test_farthest_first_finds_the_rare_cluster() -> None:
    """Four rows in 1,604 are of a cluster of their own: k-center starts there, whatever the seed."""
    common = mixture(4, 400, width=16, spread=0.02, seed=1)
    noise = 0.01 * torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    rows = torch.cat([common, unit_norm(noise - common.mean(0, keepdim=True))])
    for seed in range(4):
        counts = kmeans(rows, 5, 5, seed, start="farthest_first").counts
        assert sorted(counts.tolist()) == [4.0, 400.0, 400.0, 400.0, 400.0]


def test_an_inverted_file_is_nearly_as_good() -> None:
    rows = mixture(200, 20, width=16, spread=0.1)
    exact = kmeans(rows, 200, 4, 0)
    inverted = kmeans(rows, 200, 4, 0, ivf_above=100)
    assert inverted.similarity > 0.98 * exact.similarity
    assert not torch.equal(inverted.nearest, exact.nearest)  # it was used


def bad_rows(bad_rank: int) -> str:
    rows = mixture(3, 10)
    if rank() == bad_rank:
        rows[4, 2] = float("nan")
    try:
        kmeans(rows, 3, 2, 0)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_nan_is_refused_on_all_ranks_alike(gloo_pool) -> None:
    message = "1 of 60 embeddings are NaN or infinite: k-means has no use for them"
    assert gloo_pool(2).run(bad_rows, 1) == [message, message]


@settings(max_examples=15)
@given(seed=st.integers(0, 99), steps=st.integers(1, 6), count=st.integers(1, 9))
def test_sums_follow_moving_rows(seed: int, steps: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((50, 3)).astype(np.float32)
    sums = ClusterSums(torch.from_numpy(rows), count)
    nearest = generator.integers(0, count, 50)
    for _ in range(steps):
        moved = generator.random(50) < generator.random()
        nearest = np.where(moved, generator.integers(0, count, 50), nearest)
        sums.update(nearest)
    for cluster in range(count):
        inside = rows[nearest == cluster].astype(np.float64)
        np.testing.assert_allclose(sums.packed[cluster], [*inside.sum(0), len(inside)], atol=1e-12)


def test_a_long_clustering_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    spherical_kmeans(torch.eye(8), 2, PrototypesConfig(iterations=3), 0)
    assert "k-means of 8 rows: 2 of 3, about" in capsys.readouterr().err

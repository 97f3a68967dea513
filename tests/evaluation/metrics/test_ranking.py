"""Ranks, precision and chance against counting by hand, one query at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.evaluation.metrics import ranking

FEW = settings(max_examples=50)


@st.composite
def retrieval(draw):
    """Embeddings on a coarse grid (similarities tie), report groups with duplicates."""
    count = draw(st.integers(2, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = rng.integers(0, draw(st.integers(1, count)), count)
    return (
        rng.integers(-2, 3, (count, 2)).astype(float),
        rng.integers(-2, 3, (count, 2)).astype(float),
        groups,
    )


@FEW
@given(retrieval())
def test_best_ranks_are_those_of_brute_force(case) -> None:
    queries, gallery, groups = case
    for query, rank in enumerate(ranking.best_ranks(queries, gallery, groups, groups)):
        similarity = [float(queries[query] @ candidate) for candidate in gallery]
        # Sorted by similarity, wrong candidates before correct ones where they tie.
        order = sorted(range(len(gallery)), key=lambda i: (-similarity[i], groups[i] == groups[query]))
        assert rank == 1 + next(place for place, i in enumerate(order) if groups[i] == groups[query])


@FEW
@given(retrieval(), st.data())
def test_precision_is_the_mean_over_all_orders_of_ties(case, data) -> None:
    queries, gallery, groups = case[0][:3], case[1][:5], case[2][:5]
    relevant = groups == groups[0]
    k = data.draw(st.integers(1, len(gallery)))
    for query, precision in enumerate(ranking.precision_at(queries, gallery, relevant, k)):
        similarity = gallery @ queries[query]
        found = []
        for order in itertools.permutations(range(len(gallery))):
            ranked = sorted(order, key=lambda i: -similarity[i])
            found.append(np.mean(relevant[ranked[:k]]))
        assert precision == pytest.approx(np.mean(found))


def test_a_duplicate_report_counts_as_correct() -> None:
    images = np.eye(3)
    texts = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=float)  # the first two are swapped
    assert ranking.best_ranks(images, texts, np.array([0, 1, 2]), np.array([0, 1, 2])).tolist() == [3, 3, 1]
    assert ranking.best_ranks(images, texts, np.array([0, 0, 2]), np.array([0, 0, 2])).tolist() == [1, 1, 1]


def test_a_collapsed_model_finds_nothing() -> None:
    same = np.ones((50, 4))
    ranks = ranking.best_ranks(same, same, np.arange(50), np.arange(50))
    assert (ranks == 50).all()
    assert ranking.recall_at(ranks, 10, np.ones((1, 50)))[0] == 0


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, gallery, groups = rng.normal(size=(40, 8)), rng.normal(size=(40, 8)), rng.integers(0, 30, 40)
    whole = ranking.best_ranks(queries, gallery, groups, groups)
    monkeypatch.setattr(ranking, "_CELLS", 120)
    np.testing.assert_array_equal(ranking.best_ranks(queries, gallery, groups, groups), whole)


def test_recall_and_median_follow_the_weights() -> None:
    ranks = np.array([1, 2, 20])
    weights = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0], [2.0, 1.0, 0.0]])
    np.testing.assert_allclose(ranking.recall_at(ranks, 5, weights), [2 / 3, 0, 1])
    np.testing.assert_allclose(ranking.median_rank(ranks, weights), [2, 20, 1])


def test_chance_is_what_random_orders_give() -> None:
    groups = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    correct = np.bincount(groups)[groups]
    rng, ranks = np.random.default_rng(0), []
    for _ in range(3000):
        queries, gallery = rng.normal(size=(12, 6)), rng.normal(size=(12, 6))
        ranks.append(ranking.best_ranks(queries, gallery, groups, groups))
    found = np.concatenate(ranks)
    for k in (1, 5, 10):
        assert 1 - ranking.chance_miss(correct, 12, k) == pytest.approx((found <= k).mean(), abs=0.02)
    assert abs(ranking.chance_median_rank(correct, 12) - np.median(found)) <= 1
    assert ranking.chance_median_rank(np.ones(101), 101) == 51


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="embeddings are NaN or infinite"):
        ranking.best_ranks(np.full((2, 2), np.nan), np.ones((2, 2)), np.arange(2), np.arange(2))


def test_precision_needs_enough_candidates() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        ranking.precision_at(np.ones((2, 2)), np.ones((2, 2)), np.array([True, False]), 3)

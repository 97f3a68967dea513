"""Which pairs a table of clusters excludes, and how the metrics about them are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.distributed import rank
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.false_negatives import exclude_false_negatives
from medvlp.prototypes.table import PrototypeTable

NAN = float("nan")


def on_axes(axes: list[int], count: int) -> torch.Tensor:
    """Unit vectors near the given axes of a space of `count` dimensions."""
    return unit_norm(torch.eye(count)[axes] + 0.1)


def test_by_hand() -> None:
    table = PrototypeTable.start(torch.eye(3))
    embeddings = on_axes([0, 1, 0, 0, 1], 3)
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, NAN], [-1.0, 0.0]])
    pairs, metrics = exclude_false_negatives(table.assign(embeddings), labels, every_rank=True)
    assert pairs is not None
    expected = torch.zeros(5, 5, dtype=torch.bool)
    for i, j in [(0, 2), (0, 3), (2, 3), (1, 4)]:
        expected[i, j] = expected[j, i] = True
    assert torch.equal(pairs, expected)
    assert metrics["prototypes/masked"] == pytest.approx(4 / 10)
    # 0 and 2 share the first finding; 1 and 4 have none (uncertain is not present); 3 has none, 0 and 2 do.
    assert metrics["prototypes/mask_precision"] == pytest.approx(2 / 4)


def test_samples_without_labels_do_not_count() -> None:
    table = PrototypeTable.start(torch.eye(2))
    unknown = torch.full((3, 2), NAN)
    metrics = exclude_false_negatives(table.assign(on_axes([0, 0, 1], 2)), unknown, False).metrics
    assert metrics["prototypes/masked"] == pytest.approx(1 / 3)
    assert metrics["prototypes/mask_precision"].isnan()
    assert set(exclude_false_negatives(torch.arange(2), torch.zeros(2, 0), False).metrics) == {
        "prototypes/masked"
    }
    alone = exclude_false_negatives(torch.zeros(1).long(), torch.ones(1, 1), False)
    assert alone.pairs is not None
    assert not alone.pairs.any()
    assert alone.metrics["prototypes/masked"] == 0


def figures_by_loop(clusters: list[int], labels: list[list[float]]) -> tuple[float, float]:
    """Share of pairs in one cluster, and of the labelled ones among them that agree."""
    count = len(clusters)
    inside = [(i, j) for i in range(count) for j in range(count) if i != j and clusters[i] == clusters[j]]
    found = [{c for c, value in enumerate(row) if value == 1} for row in labels]
    known = [not all(np.isnan(row)) for row in labels]
    counted = [(i, j) for i, j in inside if known[i] and known[j]]
    agreeing = [(i, j) for i, j in counted if found[i] & found[j] or not (found[i] or found[j])]
    precision = len(agreeing) / len(counted) if counted else NAN
    return len(inside) / max(1, count * (count - 1)), precision


@settings(max_examples=25)
@given(
    samples=st.lists(
        st.tuples(
            st.integers(0, 3), st.lists(st.sampled_from([1.0, 0.0, -1.0, NAN]), min_size=2, max_size=2)
        ),
        min_size=1,
        max_size=9,
    ),
)
def test_figures_equal_a_count_by_hand(samples: list[tuple[int, list[float]]]) -> None:
    clusters, labels = [cluster for cluster, _ in samples], [found for _, found in samples]
    pairs, metrics = exclude_false_negatives(torch.tensor(clusters), torch.tensor(labels), True)
    assert pairs is not None
    assert torch.equal(pairs, pairs.T)
    assert not pairs.diagonal().any()
    masked, precision = figures_by_loop(clusters, labels)
    assert metrics["prototypes/masked"] == pytest.approx(masked)
    assert metrics["prototypes/mask_precision"].item() == pytest.approx(precision, nan_ok=True)


def exclusion_of_rank(ranks: int, every_rank: bool) -> tuple[np.ndarray, dict[str, float]]:
    """Pairs and metrics of this rank's part of eight samples."""
    generator = torch.Generator().manual_seed(0)
    embeddings = on_axes([0, 1, 0, 2, 2, 2, 0, 1], 3)
    labels = torch.randint(0, 2, (8, 2), generator=generator).float()
    labels[[1, 4]] = NAN
    each = 8 // ranks
    own = slice(rank() * each, (rank() + 1) * each)
    table = PrototypeTable.start(torch.eye(3))
    pairs, metrics = exclude_false_negatives(table.assign(embeddings[own]), labels[own], every_rank)
    assert pairs is not None
    return pairs.numpy(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_see_what_one_process_sees(gloo_pool: Any, ranks: int) -> None:
    expected, metrics = exclusion_of_rank(1, True)
    results = gloo_pool(ranks).run(exclusion_of_rank, ranks, True)
    assert np.array_equal(np.concatenate([pairs for pairs, _ in results]), expected)
    for name, value in metrics.items():
        assert np.mean([own[name] for _, own in results]) == pytest.approx(value, rel=1e-6), name
    each = 8 // ranks
    for number, (pairs, _) in enumerate(gloo_pool(ranks).run(exclusion_of_rank, ranks, False)):
        own = slice(number * each, (number + 1) * each)
        assert np.array_equal(pairs, expected[own, own])

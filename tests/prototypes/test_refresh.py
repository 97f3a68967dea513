"""One refresh: sampling, anchors, temperatures, metrics, drift, and the same result on 1, 2 and 4 ranks."""

from __future__ import annotations

import dataclasses
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import PrototypesConfig
from medvlp.distributed import rank
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes import refresh
from medvlp.prototypes.kmeans import build_search
from medvlp.prototypes.refresh import density_temperatures, refresh_table
from medvlp.prototypes.ring import BankRows
from medvlp.prototypes.sampling import row_keys, smallest
from medvlp.prototypes.search import CentroidSearch
from tests.prototypes.test_kmeans import mixture

CONFIG = PrototypesConfig(iterations=5)


def bank(embeddings: torch.Tensor, sample: torch.Tensor | None = None, labels: torch.Tensor | None = None):
    count = len(embeddings)
    return BankRows(
        embeddings,
        torch.arange(count) if sample is None else sample,
        torch.zeros(count, dtype=torch.uint8),
        torch.zeros(count, dtype=torch.int64),
        torch.full((count,), -1) if labels is None else labels,
    )


def configured(**changes) -> PrototypesConfig:
    return dataclasses.replace(CONFIG, **changes)


def refresh_own_rows(rows: np.ndarray, shares: list[float], shuffled: bool, options: dict) -> tuple:
    """Two refreshes of this rank's part of the rows; with `shuffled` in another order than the samples'."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(9 * shuffled))
    order = order if shuffled else order.sort().values
    edges = [0, *(round(share * len(rows)) for share in shares)]
    own = order[edges[rank()] : edges[rank() + 1]]
    mine = bank(torch.from_numpy(rows)[own], own, own % 3)
    config = configured(**options)
    table, _ = refresh_table(mine, None, config, 9, 7)
    assert table is not None
    again, metrics = refresh_table(mine, table, config, 9, 7)
    metrics = {name: value for name, value in metrics.items() if "seconds" not in name}
    assert again is not None
    return again.fingerprint, again.centroids.numpy(), metrics


@pytest.mark.dist
def test_the_same_however_the_rows_are_divided(gloo_pool) -> None:
    rows = mixture(9, 60, spread=0.3).numpy()
    options = {"max_points": 20, "cluster_temperature": True, "blend": 0.7, "start": "farthest_first"}
    for choice in (options, options | {"start": "k-means++", "max_points": 1000}):
        _, expected, metrics = refresh_own_rows(rows, [1.0], False, choice)
        assert metrics["prototypes/sampled"] == (180 if choice["max_points"] == 20 else 540)
        assert metrics["prototypes/nmi"] > 0
        for shares in ([0.3, 1.0], [0.6, 0.6, 0.9, 1.0]):
            results = gloo_pool(len(shares)).run(refresh_own_rows, rows, shares, True, choice)
            assert len({fingerprint for fingerprint, _, _ in results}) == 1
            for _, centroids, found in results:
                np.testing.assert_allclose(centroids, expected, atol=1e-6)
                assert found == pytest.approx(metrics, abs=1e-5)


def test_another_version_takes_another_sample() -> None:
    rows = bank(mixture(4, 200, spread=0.3))
    config = configured(max_points=10, iterations=1)
    table, _ = refresh_table(rows, None, config, 4, 0)
    counts = []
    for _ in range(2):
        table, metrics = refresh_table(rows, table, config, 4, 0)
        assert metrics["prototypes/sampled"] == 40
        counts.append(table.counts.tolist())
    assert counts[0] != counts[1]


@settings(max_examples=20)
@given(count=st.integers(1, 300), limit=st.integers(1, 310), seed=st.integers(0, 99))
def test_the_smallest_keys_are_chosen(count: int, limit: int, seed: int) -> None:
    keys = row_keys(seed, torch.arange(count))
    assert len(keys.unique()) == count
    assert (keys >= 0).all()
    chosen = smallest(keys, limit)
    assert chosen.sum() == min(count, limit)
    assert set(keys[chosen].tolist()) == set(keys.sort().values[:limit].tolist())


@pytest.mark.parametrize("ends_on", ["a GPU", "the CPU, in the middle of it", "the CPU"])
def test_it_is_logged_whether_a_gpu_did_the_work(ends_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_cpu_when_it_runs_out_of_memory(*sizes: int) -> CentroidSearch:
        search = build_search(*sizes[:3], CONFIG)
        search.on_gpu = ends_on != "the CPU"
        if "middle" in ends_on:
            search._index = Mock(search=Mock(side_effect=RuntimeError("out of memory")))
        return search

    monkeypatch.setattr(refresh, "build_search", on_cpu_when_it_runs_out_of_memory)
    table, metrics = refresh_table(bank(mixture(4, 20)), None, CONFIG, 4, 0)
    assert table is not None
    assert metrics["prototypes/on_gpu"] == (ends_on == "a GPU")


def test_too_few_rows_put_a_refresh_off() -> None:
    table, metrics = refresh_table(bank(mixture(4, 5)), None, CONFIG, 21, 0)
    assert table is None
    assert (metrics["prototypes/put_off"], metrics["prototypes/rows"]) == (1, 20)
    table, metrics = refresh_table(bank(mixture(4, 5)), None, configured(min_points=5), 4, 0)
    assert metrics["prototypes/put_off"] == 0
    assert refresh_table(bank(mixture(4, 5)), table, configured(min_points=6), 4, 0)[0] is None


def test_rows_without_direction_are_left_out() -> None:
    rows = mixture(4, 20)
    clean, _ = refresh_table(bank(rows), None, CONFIG, 4, 0)
    broken = torch.cat([rows, torch.full((2, 8), float("nan")), torch.zeros(1, 8), torch.full((1, 8), 1e38)])
    broken[-1] = float("inf")
    table, metrics = refresh_table(bank(broken), None, CONFIG, 4, 0)
    assert metrics["prototypes/unusable"] == 4
    assert metrics["prototypes/rows"] == 80
    assert torch.equal(table.centroids, clean.centroids)


def test_ids_hardly_change_while_rows_drift() -> None:
    """10 refreshes, between which every row moves by about 3 degrees: in all at most 10 % change cluster."""
    generator = torch.Generator().manual_seed(0)
    rows = mixture(12, 40, width=32, spread=0.1)
    table, _ = refresh_table(bank(rows), None, CONFIG, 12, 0)
    begun, churns = table.assign(rows), []
    for _ in range(10):
        rows = unit_norm(rows + 0.01 * torch.randn(rows.shape, generator=generator))
        table, metrics = refresh_table(bank(rows), table, CONFIG, 12, 0)
        churns.append(metrics["prototypes/churn"])
    assert max(churns) < 0.05
    assert (begun != table.assign(rows)).float().mean() < 0.1
    # Clusters found anew have other ids: what a warm start saves.
    anew, _ = refresh_table(bank(rows), None, CONFIG, 12, 1)
    assert (begun != anew.assign(rows)).float().mean() > 0.5


def test_churn_counts_rows_that_moved() -> None:
    old = bank(mixture(3, 30, seed=1))
    table, metrics = refresh_table(old, None, CONFIG, 3, 0)
    assert "prototypes/churn" not in metrics
    other = bank(mixture(6, 30, spread=0.3, seed=5))
    before = table.assign(other.embeddings)
    table, metrics = refresh_table(other, table, CONFIG, 3, 0)
    moved = (before != table.assign(other.embeddings)).float().mean()
    assert moved > 0
    assert metrics["prototypes/churn"] == pytest.approx(float(moved))


@pytest.mark.parametrize("pull", [1.0, 0.6])
def test_anchors_hold_the_first_clusters(pull: float) -> None:
    rows = mixture(4, 50, width=16, spread=0.2, seed=2)
    anchors = unit_norm(torch.stack([rows[0] + 0.4 * torch.randn(16), -rows.mean(0)]))
    config = configured(anchors=["a", "b"], anchor_pull=pull, blend=0.5)
    free, _ = refresh_table(bank(rows), None, configured(blend=0.5), 5, 0)
    table = None
    for moved in (anchors, unit_norm(anchors + 0.1 * torch.randn(2, 16))):  # the encoder is in training
        table, metrics = refresh_table(bank(rows), table, config, 5, 0, moved)
        cosine = (table.centroids[:2] * moved).sum(1)
        if pull == 1:
            torch.testing.assert_close(table.centroids[:2], moved)
        else:
            assert (cosine > 0.6).all()
        assert metrics["prototypes/similarity"] > 0.5
    assert table.centroids.shape == free.centroids.shape
    # The second text lies where no row is: its cluster stays there and is not used up by a split.
    assert table.counts[1] == 0


def test_wrong_shapes_are_named() -> None:
    table, _ = refresh_table(bank(mixture(4, 20)), None, CONFIG, 4, 0)
    with pytest.raises(ValueError, match=r"\(4, 8\), this run's is \(5, 8\)"):
        refresh_table(bank(mixture(4, 20)), table, CONFIG, 5, 0)
    with pytest.raises(ValueError, match=r"prototypes\.anchors"):
        refresh_table(bank(mixture(4, 20)), None, CONFIG, 4, 0, torch.eye(3))


def test_agreement_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, group = mixture(4, 60), torch.zeros(240, dtype=torch.int64)
    table, metrics = refresh_table(bank(rows), None, CONFIG, 4, 0)
    assert not any("nmi" in name for name in metrics)
    group = table.assign(rows)
    labels = torch.tensor([0b01, 0b10, 0b11, 0b00])[group]
    _, metrics = refresh_table(bank(rows, labels=labels), table, CONFIG, 4, 0)
    assert metrics["prototypes/nmi"] == pytest.approx(1)
    assert metrics["prototypes/purity"] == 1
    assert 0.4 < metrics["prototypes/nmi_findings"] < 0.8  # a bit each, of clusters worth two
    monkeypatch.setattr(refresh, "LABELLED_ROWS", 50)
    unknown = torch.where(torch.arange(240) < 100, -1, labels)
    _, metrics = refresh_table(bank(rows, labels=unknown), table, CONFIG, 4, 0)
    assert metrics["prototypes/purity"] == 1
    noise = torch.randint(0, 4, (240,), generator=torch.Generator().manual_seed(0))
    _, metrics = refresh_table(bank(rows, labels=noise), table, CONFIG, 4, 0)
    assert metrics["prototypes/nmi"] < 0.3
    assert metrics["prototypes/purity"] < 0.6


def one_label(rows: np.ndarray, shares: list[float], place: int) -> dict[str, float]:
    """The metrics of a refresh on a tenth of the rows, of which one has a label; of this rank's part."""
    edges = [0, *(round(share * len(rows)) for share in shares)]
    own = torch.arange(len(rows))[edges[rank()] : edges[rank() + 1]]
    mine = bank(torch.from_numpy(rows)[own], own, torch.where(own == place, 1, -1))
    table, metrics = refresh_table(mine, None, configured(max_points=1, min_points=1), 3, 0)
    assert table is not None
    return metrics


@pytest.mark.dist
def test_labels_of_rows_that_are_not_chosen_say_nothing(gloo_pool) -> None:
    """Agreement was asked for as soon as any row had a label, and then there was none in the sample."""
    rows = mixture(3, 10).numpy()
    told = ["prototypes/nmi" in one_label(rows, [1.0], place) for place in range(len(rows))]
    assert sum(told) == 3
    for place in (told.index(False), told.index(True)):
        for metrics in gloo_pool(2).run(one_label, rows, [0.5, 1.0], place):
            assert ("prototypes/nmi" in metrics) == told[place]


def test_dense_clusters_get_low_temperatures() -> None:
    generator = torch.Generator().manual_seed(0)
    spreads = torch.tensor([0.02, 0.05, 0.1, 0.15]).repeat_interleave(100)[:, None]
    centers = unit_norm(torch.randn(4, 16, generator=generator)).repeat_interleave(100, 0)
    rows = unit_norm(centers + spreads * torch.randn(400, 16, generator=generator))
    table, _ = refresh_table(
        bank(rows), None, configured(cluster_temperature=True, start="farthest_first"), 4, 0
    )
    order = table.assign(centers[::100])
    temperatures = table.temperatures[order]
    assert (temperatures.diff() > 0).all()
    assert table.temperatures.mean().item() == pytest.approx(CONFIG.temperature)
    plain, _ = refresh_table(bank(rows), None, CONFIG, 4, 0)
    assert (plain.temperatures == CONFIG.temperature).all()


def test_temperatures_as_published() -> None:
    """By hand from PCL's formula: phi = sum / (n log(n + 10)), one row takes the largest, clipped, scaled."""
    counts = torch.tensor([1.0, 4.0, 9.0, 0.0])
    distances = torch.tensor([0.9, 2.0, 3.0, 0.0], dtype=torch.float64)
    second, third = 2.0 / (4 * np.log(14)), 3.0 / (9 * np.log(19))
    density = np.array([second, second, third, second])
    density = density.clip(np.percentile(density, 10), np.percentile(density, 90))
    found = density_temperatures(distances, counts, 0.2)
    np.testing.assert_allclose(found.numpy(), 0.2 * density / density.mean(), rtol=1e-6)
    assert (density_temperatures(torch.zeros(3), torch.ones(3), 0.2) == 0.2).all()

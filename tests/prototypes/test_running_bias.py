"""The running bias and soft assignments: balance, agreement with Sinkhorn, ranks, resuming, corners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.distributed import rank
from medvlp.losses.normalise import unit_norm
from medvlp.losses.sinkhorn import sinkhorn
from medvlp.prototypes.running_bias import RunningBias
from medvlp.prototypes.table import BALANCES, PrototypeTable

EPSILON = 0.05


def long_tail(rows: int = 4096, clusters: int = 64, width: int = 32) -> tuple[torch.Tensor, PrototypeTable]:
    """Rows of classes of very different sizes, and a table of some of them."""
    generator = torch.Generator().manual_seed(0)
    centers = unit_norm(torch.randn(40, width, generator=generator))
    groups = torch.multinomial(1 / torch.arange(1, 41.0), rows, True, generator=generator)
    embeddings = unit_norm(centers[groups] + 0.1 * torch.randn(rows, width, generator=generator))
    chosen = embeddings[torch.randperm(rows, generator=generator)[:clusters]]
    return embeddings, PrototypeTable.start(chosen, temperature=EPSILON, balance="bias")


def trained(table: PrototypeTable, bias: RunningBias, rows: np.ndarray, steps: range, ranks: int) -> None:
    """Steps on batches of 512 of all ranks."""
    for step in steps:
        batch = torch.from_numpy(rows[step * 512 % len(rows) :][:512])
        table.balanced_by(bias).soft_assign(batch.chunk(ranks)[rank()])
        bias.step()


def test_assignments_become_those_of_sinkhorn() -> None:
    rows, table = long_tail()
    goal = sinkhorn(table.scores(rows), EPSILON, 100)
    bias = RunningBias(64)
    trained(table, bias, rows.numpy(), range(200), 1)
    found = table.balanced_by(bias).soft_assign(rows)
    same = {
        "bias": (found.argmax(1) == goal.argmax(1)).float().mean(),
        "none": (table.scores(rows).argmax(1) == goal.argmax(1)).float().mean(),
    }
    assert same["none"] < 0.75
    assert same["bias"] > 0.9
    assert 64 * found.mean(0).min() > 0.6
    assert 64 * found.mean(0).max() < 1.6


def bias_of_own_rows(rows: np.ndarray, centroids: np.ndarray, ranks: int) -> np.ndarray:
    table = PrototypeTable.start(torch.from_numpy(centroids), temperature=EPSILON, balance="bias")
    bias = RunningBias(len(centroids))
    trained(table, bias, rows, range(5), ranks)
    return bias.log_bias.numpy()


@pytest.mark.dist
def test_all_ranks_move_it_alike(gloo_pool) -> None:
    rows, table = long_tail(1024)
    alone = bias_of_own_rows(rows.numpy(), table.centroids.numpy(), 1)
    assert np.abs(alone).max() > 0.1
    results = gloo_pool(2).run(bias_of_own_rows, rows.numpy(), table.centroids.numpy(), 2)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], alone, atol=1e-5)


def test_resumes_and_forgets_bad_steps() -> None:
    rows, table = long_tail(1024)
    whole, stopped, other = RunningBias(64), RunningBias(64), RunningBias(64)
    trained(table, whole, rows.numpy(), range(6), 1)
    trained(table, stopped, rows.numpy(), range(3), 1)
    table.balanced_by(stopped).soft_assign(rows[:7])
    stopped.step(applied=False)
    other.load_state_dict(stopped.state_dict())
    trained(table, other, rows.numpy(), range(3, 6), 1)
    assert torch.equal(whole.log_bias, other.log_bias)
    unused = other.log_bias.clone()
    other.step()
    assert torch.equal(other.log_bias, unused)
    with pytest.raises(ValueError, match="64 clusters, this run's of 3"):
        RunningBias(3).load_state_dict(other.state_dict())


def test_starts_from_the_first_table_only() -> None:
    rows, table = long_tail(256)
    first = PrototypeTable(**{**table.state_dict(), "log_bias": torch.linspace(-1, 1, 64)})
    bias = RunningBias(64)
    assert torch.equal(first.balanced_by(bias).soft_assign(rows), first.soft_assign(rows))
    table.balanced_by(bias)
    assert torch.equal(bias.log_bias, first.log_bias)
    assert first.balanced_by(bias).fingerprint == first.fingerprint


@settings(max_examples=25)
@given(
    rows=st.integers(1, 3),
    clusters=st.integers(1, 2000),
    balance=st.sampled_from(BALANCES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    same=st.booleans(),
    each=st.booleans(),
)
def test_few_rows_and_sharp_temperatures_stay_finite(
    rows: int, clusters: int, balance: str, dtype: torch.dtype, same: bool, each: bool
) -> None:
    """B < K, K much larger than B, half precision, an epsilon of 0.01."""
    generator = torch.Generator().manual_seed(clusters)
    centroids = torch.randn(clusters, 16, generator=generator)
    table = PrototypeTable.start(centroids[:1].expand(clusters, -1) if same else centroids, 1, 0.01, balance)
    if each:
        state = table.state_dict()
        table = PrototypeTable(**{**state, "temperatures": torch.linspace(0.002, 0.03, clusters)})
    embeddings = unit_norm(torch.randn(rows, 16, generator=generator)).to(dtype)
    codes = table.soft_assign(embeddings)
    assert codes.dtype == torch.float32
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(rows))
    assert table.assign(embeddings).max() < clusters


def test_each_cluster_has_its_temperature() -> None:
    table = PrototypeTable.start(torch.eye(2), temperature=0.1, balance="none")
    rows = unit_norm(torch.tensor([[1.0, 1.0]]))
    assert table.soft_assign(rows)[0].tolist() == [0.5, 0.5]
    sharper = PrototypeTable(**{**table.state_dict(), "temperatures": torch.tensor([0.05, 0.15])})
    expected = torch.tensor([0.5**0.5 / 0.05, 0.5**0.5 / 0.15]).softmax(0)
    torch.testing.assert_close(sharper.soft_assign(rows)[0], expected)
    assert sharper.fingerprint != table.fingerprint
    with pytest.raises(ValueError, match="temperatures"):
        PrototypeTable(**{**table.state_dict(), "temperatures": torch.tensor([0.1, 0.0])})

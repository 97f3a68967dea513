"""Hungarian matching against every permutation, and its corners."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.losses.matching import match


def lowest_cost(cost: torch.Tensor) -> float:
    """Least summed cost of giving each column of [N, M] a row of its own (M <= N), by trying all."""
    rows, columns = cost.shape
    return min(
        sum(cost[row, column].item() for column, row in enumerate(choice))
        for choice in itertools.permutations(range(rows), columns)
    )


@settings(max_examples=25)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 1000))
def test_no_other_matching_costs_less(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(3, rows, columns, generator=generator)
    valid = torch.rand(3, columns, generator=generator) < 0.7
    chosen = match(cost, valid)
    assert chosen.shape == valid.shape
    assert chosen.dtype == torch.int64
    for sample in range(3):
        matched = valid[sample].nonzero()[:, 0][:rows]
        assert (chosen[sample] >= 0).nonzero()[:, 0].tolist() == matched.tolist()
        own = chosen[sample, matched]
        assert len(set(own.tolist())) == len(matched)
        total = cost[sample, own, matched].sum().item()
        assert total == pytest.approx(lowest_cost(cost[sample][:, matched]), abs=1e-5)


def test_more_columns_than_rows_keeps_the_first_valid_ones() -> None:
    cost = torch.tensor([[[9.0, 9.0, 0.0, 0.0], [9.0, 0.0, 9.0, 0.0]]])
    # Column 3 would be cheapest, but columns 1 and 2 come first.
    assert match(cost, torch.tensor([[False, True, True, True]])).tolist() == [[-1, 1, 0, -1]]


def test_no_valid_column_and_no_gradient() -> None:
    cost = torch.randn(2, 3, 4, requires_grad=True)
    chosen = match(cost, torch.zeros(2, 4, dtype=torch.bool))
    assert (chosen == -1).all()
    assert not chosen.requires_grad
    assert match(torch.zeros(0, 3, 4), torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_costs_that_are_not_finite_still_give_a_matching(bad: float, dtype: torch.dtype) -> None:
    cost = torch.zeros(1, 3, 3, dtype=dtype)
    cost[0, 1] = bad
    assert sorted(match(cost, torch.ones(1, 3, dtype=torch.bool))[0].tolist()) == [0, 1, 2]

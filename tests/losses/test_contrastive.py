"""InfoNCE with excluded columns: they take part in nothing, a row's own column always does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvlp.losses.contrastive import in_batch_accuracy, paired_cross_entropy


def test_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 5.0]])
    excluded = torch.tensor([[True, True, False], [False, False, True]])
    # Row 0 keeps its own column 0 and column 2, row 1 keeps columns 0 and 1.
    expected = 0.5 * (torch.tensor(-2.0).exp().log1p() + torch.tensor(-3.0).exp().log1p())
    torch.testing.assert_close(paired_cross_entropy(logits, 0, excluded), expected)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 5),
    ranks=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_a_loop_over_what_is_left(rows: int, ranks: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns, offset = rows * ranks, rows * (ranks - 1)
    raw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    excluded = torch.rand(rows, columns, generator=generator) < share
    results = []
    for ours in (True, False):
        logits = raw.clone().requires_grad_()
        if ours:
            loss = paired_cross_entropy(logits, offset, excluded)
        else:
            losses = []
            for row in range(rows):
                left = [c for c in range(columns) if c == offset + row or not excluded[row, c]]
                own = torch.tensor([left.index(offset + row)])
                losses.append(F.cross_entropy(logits[row, left][None], own))
            loss = torch.stack(losses).mean()
        loss.backward()
        results.append((loss.detach(), logits.grad))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nothing_left_is_zero_without_gradient(dtype: torch.dtype) -> None:
    logits = (30 * torch.eye(3)[[1, 2, 0]]).to(dtype).requires_grad_()
    loss = paired_cross_entropy(logits, 0, torch.ones(3, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_accuracy_counts_the_columns_above_ones_own() -> None:
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    for k in (1, 3, 20):
        highest = logits.topk(min(k, 12), 1).indices
        expected = (highest == torch.arange(2, 8)[:, None]).any(1).float().mean()
        assert in_batch_accuracy(logits, 2, k) == expected
    logits[0, 5] = torch.nan
    logits[1] = torch.nan
    assert in_batch_accuracy(logits[:2], 2, 1) == 0

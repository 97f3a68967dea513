"""The shared-exponentials contrast: equal to two cross-entropies, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvlp.losses.cross_attention import diagonal_contrast
from medvlp.losses.normalise import unit_norm


def by_cross_entropy(
    tokens: torch.Tensor, context: torch.Tensor, valid: torch.Tensor, temperature: float
) -> torch.Tensor:
    """One sample at a time, padding left out."""
    losses = torch.zeros(valid.shape, dtype=tokens.dtype)
    for row, kept in enumerate(valid):
        logits = tokens[row][kept] @ context[row][kept].T / temperature
        labels = torch.arange(len(logits))
        both = F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(
            logits.T, labels, reduction="none"
        )
        losses[row] = torch.zeros(len(kept), dtype=tokens.dtype).masked_scatter(kept, both)
    return losses


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    temperature=st.sampled_from([1.0, 0.1, 0.05, 0.003]),
    seed=st.integers(0, 1000),
)
def test_equals_two_cross_entropies(batch: int, length: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(2, batch, length, 4, generator=generator, dtype=torch.float64)
    valid = torch.rand(batch, length, generator=generator) < 0.7
    weights = torch.rand(batch, length, generator=generator, dtype=torch.float64)
    results = []
    for function in (diagonal_contrast, by_cross_entropy):
        leaf = raw.clone().requires_grad_()
        tokens, context = unit_norm(leaf)
        loss = function(tokens, context, valid, temperature)
        (loss * weights).sum().backward()
        results.append((loss.detach(), leaf.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.1, 0.0475, 0.0455, 0.001])
def test_opposite_tokens_stay_finite_in_float32(temperature: float) -> None:
    """On both sides of the limit below which exponentials could underflow."""
    token = torch.zeros(1, 2, 3)
    token[:, :, 0] = 1
    context = torch.stack([-token[:, 0], token[:, 1]], 1)
    tokens = token.requires_grad_()
    loss = diagonal_contrast(tokens, context, None, temperature)
    torch.testing.assert_close(loss[0, 0], torch.tensor(2 / temperature) + torch.log(torch.tensor(2.0)))
    loss.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()

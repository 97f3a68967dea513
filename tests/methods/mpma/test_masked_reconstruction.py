"""Reconstruction losses against loops written from their definition."""

from __future__ import annotations

import math

import pytest
import torch

from medvlp.methods.mpma.losses import (
    masked_patch_loss,
    masked_token_loss,
    patch_targets,
    right_tokens,
)


def slow_patch(image: torch.Tensor, side: int, row: int, column: int) -> list[float]:
    return [
        image[channel, row * side + y, column * side + x].item()
        for y in range(side)
        for x in range(side)
        for channel in range(image.shape[0])
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_targets_are_the_patches_row_by_row(channels: int) -> None:
    images = torch.rand(2, channels, 8, 12, dtype=torch.float64)
    plain, normalised = patch_targets(images, 4, False), patch_targets(images, 4)
    assert plain.shape == (2, 6, 16 * channels)
    for sample in range(2):
        for patch in range(6):
            expected = slow_patch(images[sample], 4, patch // 3, patch % 3)
            assert plain[sample, patch].tolist() == expected
            mean = sum(expected) / len(expected)
            variance = sum((value - mean) ** 2 for value in expected) / (len(expected) - 1)
            scaled = [(value - mean) / math.sqrt(variance + 1e-6) for value in expected]
            torch.testing.assert_close(normalised[sample, patch].tolist(), scaled)


def test_a_patch_of_one_colour_is_zero() -> None:
    assert (patch_targets(torch.full((1, 1, 4, 4), 0.7), 4).abs() < 1e-3).all()


def test_only_hidden_patches_enter_the_loss() -> None:
    targets = torch.rand(2, 5, 3, dtype=torch.float64)
    predicted = torch.rand(2, 2, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.tensor([[0, 3], [1, 4]])
    expected = 0.0
    for sample in range(2):
        for place, patch in enumerate(hidden[sample].tolist()):
            errors = [
                (predicted[sample, place, pixel] - targets[sample, patch, pixel]).item() ** 2
                for pixel in range(3)
            ]
            expected += sum(errors) / 3
    loss = masked_patch_loss(predicted, targets, hidden)
    assert loss.item() == pytest.approx(expected / 4)
    changed = targets.clone()
    changed[0, 1] = 100
    assert masked_patch_loss(predicted, changed, hidden) == loss


def test_no_hidden_patch_is_no_loss() -> None:
    empty = torch.zeros(2, 0, dtype=torch.long)
    predicted = torch.zeros(2, 0, 3, requires_grad=True)
    loss = masked_patch_loss(predicted, torch.rand(2, 5, 3), empty)
    loss.backward()
    assert loss == 0


def test_only_hidden_tokens_enter_the_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 6, (2, 4))
    hidden = torch.tensor([[True, False, True, False], [False, False, False, True]])
    terms = []
    for row in range(2):
        for column in range(4):
            if hidden[row, column]:
                weights = [math.exp(value) for value in logits[row, column].tolist()]
                terms.append(-math.log(weights[tokens[row, column]] / sum(weights)))
    loss = masked_token_loss(logits, tokens, hidden)
    assert loss.item() == pytest.approx(sum(terms) / 3)
    assert masked_token_loss(logits, tokens, hidden, torch.tensor(6.0)).item() == pytest.approx(
        sum(terms) / 6
    )
    loss.backward()
    assert (logits.grad[~hidden] == 0).all()
    assert (logits.grad[hidden].abs().sum(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_hidden_token_is_no_loss(dtype: torch.dtype) -> None:
    logits = torch.full((1, 2, 3), 6e4, dtype=dtype, requires_grad=True)
    none = torch.zeros(1, 2, dtype=torch.bool)
    loss = masked_token_loss(logits, torch.zeros(1, 2, dtype=torch.long), none)
    loss.backward()
    assert loss == 0
    assert loss.dtype == torch.float32
    assert (logits.grad == 0).all()
    assert right_tokens(logits, torch.zeros(1, 2, dtype=torch.long), none) == 0


def test_accuracy_counts_hidden_tokens_only() -> None:
    logits = torch.eye(3)[None].repeat(2, 1, 1)
    tokens = torch.tensor([[0, 1, 0], [0, 0, 2]])
    hidden = torch.tensor([[True, True, True], [False, True, False]])
    assert right_tokens(logits, tokens, hidden) == 2

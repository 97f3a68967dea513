"""Correlations of pixels against numpy, one pair at a time; the loss against a loop; corners."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.methods.place.terms import correlation_loss, feature_correlation, pixel_correlation


def slow_correlation(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """numpy.corrcoef of every two cells of a [H, W] image that the grid divides."""
    rows, columns = grid
    height, width = image.shape[0] // rows, image.shape[1] // columns
    cells = [
        image[r * height : (r + 1) * height, c * width : (c + 1) * width].ravel().astype(np.float64)
        for r in range(rows)
        for c in range(columns)
    ]
    return np.array([[np.corrcoef(a, b)[0, 1] for b in cells] for a in cells])


@settings(max_examples=25)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), side=st.integers(2, 5), seed=st.integers(0, 10_000))
def test_equals_numpy(rows: int, columns: int, side: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1, rows * side, columns * side)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    correlation, usable = pixel_correlation(image, (rows, columns))
    assert usable.all()
    for sample in range(2):
        expected = slow_correlation(image[sample, 0].numpy(), (rows, columns))
        np.testing.assert_allclose(correlation[sample].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(("size", "grid"), [((32, 32), (5, 5)), ((7, 9), (7, 9)), ((3, 5), (4, 2))])
def test_grids_that_do_not_divide_enlarge_the_image(size: tuple[int, int], grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 1, *size), dtype=torch.uint8, generator=generator)
    correlation, usable = pixel_correlation(image, grid)
    target = [max(2, -(-pixels // cells)) * cells for pixels, cells in zip(size, grid, strict=True)]
    enlarged = cv2.resize(image[0, 0].numpy().astype(np.float32), (target[1], target[0]))
    np.testing.assert_allclose(correlation[0].numpy(), slow_correlation(enlarged, grid), atol=1e-4)
    assert usable.all()


def test_flat_cells_are_not_usable_but_one_gray_level_is() -> None:
    image = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    image[0, 0, :, 4:] = torch.arange(16, dtype=torch.uint8).reshape(4, 4) % 2
    correlation, usable = pixel_correlation(image, (1, 2))
    assert usable.tolist() == [[False, True]]
    torch.testing.assert_close(correlation, torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]))


@pytest.mark.parametrize("huber", [None, 0.1])
def test_loss_equals_a_loop(huber: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 3, generator=generator).double()
    target = torch.rand(2, 5, 5, generator=generator).double() * 2 - 1
    usable = torch.tensor([[True, False, True, True, True], [False, True, False, False, False]])
    losses = []
    for sample in range(2):
        errors = []
        for i in range(5):
            for j in range(i + 1, 5):
                if usable[sample, i] and usable[sample, j]:
                    cosine = torch.cosine_similarity(tokens[sample, i], tokens[sample, j], dim=0)
                    error = (cosine - target[sample, i, j]).abs().item()
                    if huber is None:
                        errors.append(error**2)
                    else:
                        errors.append(error**2 / 2 if error < huber else huber * (error - huber / 2))
        losses.append(sum(errors) / max(1, len(errors)))
    assert losses[1] == 0
    assert losses[0] > 0
    loss = correlation_loss(tokens, target, usable, huber)
    assert loss.item() == pytest.approx(sum(losses) / 2, abs=1e-9)


def test_loss_is_zero_at_the_target_and_on_corners() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 6, 4, generator=generator, requires_grad=True)
    unit = torch.nn.functional.normalize(tokens.detach(), dim=2)
    exact = unit @ unit.transpose(1, 2)
    assert correlation_loss(tokens, exact, torch.ones(1, 6, dtype=torch.bool)) < 1e-12
    for usable in (torch.zeros(1, 6, dtype=torch.bool), torch.eye(6, dtype=torch.bool)[:1]):
        loss = correlation_loss(tokens, torch.zeros(1, 6, 6), usable)
        assert loss == 0
        loss.backward()
        assert (tokens.grad == 0).all()
    single = torch.randn(2, 1, 4, requires_grad=True)
    assert correlation_loss(single, torch.ones(2, 1, 1), torch.ones(2, 1, dtype=torch.bool)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    tokens = (torch.randn(1, 4, 3) * 300).to(dtype)
    correlation, usable = feature_correlation(tokens)
    assert correlation.dtype == torch.float32
    loss = correlation_loss(tokens, correlation, usable)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_feature_correlation_is_centred_over_patches_and_masks_equal_ones() -> None:
    features = torch.randn(2, 5, 3, requires_grad=True)
    correlation, usable = feature_correlation(features)
    shifted, _ = feature_correlation(features.detach() + 7.0)
    torch.testing.assert_close(correlation, shifted, rtol=1e-4, atol=1e-5)
    assert not correlation.requires_grad
    assert usable.all()
    equal, usable = feature_correlation(torch.full((1, 7, 3), 0.1))
    assert not usable.any()
    assert (equal == 0).all()

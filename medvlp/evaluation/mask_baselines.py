"""Masks without a network: means of the training masks, and ridge regression from pixels to coarse masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.data.batch import Batch
from medvlp.evaluation.baselines import PixelRidge
from medvlp.evaluation.features import shrink

#: Batch -> masks [B, C, H, W] bool of the findings, and whether each is known [B, C].
Truth = Callable[[Batch], tuple[Tensor, Tensor]]
#: Baseline -> its probabilities [B, C, H, W] for a batch.
Draws = dict[str, Callable[[Batch], Tensor]]

#: Side of the masks that the regression draws.
GRID = 16
#: Training images the regression learns from at most: its targets, and no maps, are held.
MOST_IMAGES = 4096


def taught(batches: Callable[[], Iterable[Batch]], truth: Truth) -> Draws:
    """The baselines "pixels" and "mean-mask".

    Args:
        batches: reads the training images. truth: their masks.
    """
    return {"pixels": _pixel_masks(batches(), truth), "mean-mask": _mean_masks(batches(), truth)}


def _mean_masks(batches: Iterable[Batch], truth: Truth) -> Callable[[Batch], Tensor]:
    """The share of the images with a finding in whose mask each pixel lies; zeros for one that none shows."""
    total: Tensor | float = 0.0
    shown: Tensor | float = 0.0
    for batch in batches:
        masks, known = truth(batch)
        masks = masks & known[..., None, None]
        total = total + masks.sum(0).double()
        shown = shown + masks.flatten(2).any(2).sum(0).double()
    assert isinstance(total, Tensor)
    assert isinstance(shown, Tensor)
    mean = (total / shown.clamp(min=1)[:, None, None]).float()
    return lambda batch: mean.expand(len(batch.image), -1, -1, -1)


def _pixel_masks(batches: Iterable[Batch], truth: Truth) -> Callable[[Batch], Tensor]:
    """Ridge regression to each cell of a coarse mask; a mask that is not known stands at the mean."""
    pixels, coarse = [], []
    for batch in batches:
        masks, known = truth(batch)
        small = F.interpolate(masks.float(), size=(GRID, GRID), mode="area")
        small[~known] = torch.nan
        pixels.append(shrink(batch.image))
        coarse.append(small.numpy())
        if sum(len(part) for part in pixels) >= MOST_IMAGES:
            break
    targets = np.concatenate(coarse).astype(np.float64)
    learned = ~np.isnan(targets).all(axis=(0, 2, 3))
    # Of a finding that is nowhere known nothing is drawn; unknown masks at the mean need one decomposition.
    targets[:, ~learned] = 0.0
    targets = np.where(np.isnan(targets), np.nanmean(targets, axis=0), targets)
    ridge = PixelRidge(np.concatenate(pixels)).fit(targets.reshape(len(targets), -1))

    def draw(batch: Batch) -> Tensor:
        found = torch.from_numpy(ridge.predict(shrink(batch.image))).float()
        grid = found.reshape(len(found), -1, GRID, GRID).clamp(0, 1)
        return F.interpolate(grid, size=batch.image.shape[-2:], mode="bilinear", align_corners=False)

    return draw

"""How alike the patches of an image are, and the loss of predicting it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.losses.normalise import at_least_float32, unit_norm


@torch.no_grad()
def pixel_correlation(image: Tensor, grid: tuple[int, int], flat: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Pearson correlation between the pixels of any two cells of a grid over the image.

    Args:
        image: [B, C, H, W], uint8, or floating point in [0, 1].
        grid: (rows, columns); a cell is the part of the image that one patch token or one pixel of a
            feature map stands for. Where the grid does not divide the image, or cells would have a side of
            one pixel, the image is enlarged (bilinear) to the next size at which they have at least two.
        flat: cells whose pixels have a standard deviation of at most this have no correlation (1/255 is one
            gray level).

    Returns:
        correlation [B, P, P] float32 or better in [-1, 1], 0 where a cell is flat; and usable [B, P] bool,
        cells that are not flat. P = rows * columns, row-major. (Our reconstruction of PLACE's target.)
    """
    values = image.float() / 255 if image.dtype == torch.uint8 else at_least_float32(image)
    (batch, channels), (rows, columns) = values.shape[:2], grid
    height, width = (max(2, -(-size // cells)) for size, cells in zip(values.shape[2:], grid, strict=True))
    if values.shape[2:] != (rows * height, columns * width):
        values = F.interpolate(
            values, size=(rows * height, columns * width), mode="bilinear", align_corners=False
        )
    cells = values.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    vectors = cells.reshape(batch, rows * columns, channels * height * width)
    centred = vectors - vectors.mean(2, keepdim=True)
    usable = centred.square().mean(2) > flat**2
    unit = unit_norm(centred) * usable[:, :, None]
    return unit @ unit.transpose(1, 2), usable


@torch.no_grad()
def feature_correlation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation between patch features, which are centred over the patches of their image.

    Args:
        features: [B, P, D] of a teacher; no gradient flows to them.

    Returns:
        As `pixel_correlation`; patches whose centred feature is only rounding are not usable.
    """
    values = at_least_float32(features)
    centred = values - values.mean(1, keepdim=True)
    usable = centred.abs().amax(2) > 1e-5 * values.abs().amax((1, 2))[:, None]
    unit = unit_norm(centred) * usable[:, :, None]
    return unit @ unit.transpose(1, 2), usable


def correlation_loss(tokens: Tensor, target: Tensor, usable: Tensor, huber: float | None = None) -> Tensor:
    """Mean error of the cosines between tokens as predictions of the correlations between patches.

    Args:
        tokens: [B, P, D], not normalised.
        target: [B, P, P] correlations in [-1, 1]. usable: [B, P] bool, patches that have one.
        huber: errors above this count linearly (Huber's loss, which is half the square below); None: the
            square.

    Returns:
        0-d loss: mean over the pairs i < j of usable patches of an image, then over images; an image
        without such a pair adds 0. (PLACE: our reconstruction of "patch-level covariance".)
    """
    unit = unit_norm(tokens)
    predicted = unit @ unit.transpose(1, 2)
    target = target.to(predicted.dtype)
    if huber is None:
        error = (predicted - target).square()
    else:
        error = F.huber_loss(predicted, target, reduction="none", delta=huber)
    pairs = (usable[:, :, None] & usable[:, None, :]).triu(1)
    total = (error * pairs).sum((1, 2))
    return (total / pairs.sum((1, 2)).clamp(min=1)).mean()

"""Means over the valid entries of padded tensors, of this rank or of all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def masked_mean(
    values: Tensor, valid: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean of the valid entries; 0 without any.

    Args:
        values: [B, S]. valid: [B, S] bool.
        mean_over_ranks: mean of a 0-d tensor over ranks, without gradient. With it the denominator is the
            mean number of valid entries per rank, so that the mean of the results over ranks (and of their
            gradients) is that of all ranks' entries together; None: of this rank's alone.

    Returns:
        0-d mean.
    """
    count = valid.sum().to(values.dtype)
    if mean_over_ranks is not None:
        count = mean_over_ranks(count)
    total = values.masked_fill(~valid, 0).sum()
    return total / torch.where(count > 0, count, torch.ones_like(count))

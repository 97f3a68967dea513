"""Predicted sets of vectors against target sets, each prediction paired with one target."""

from __future__ import annotations

import torch
from torch import Tensor

from medvlp.losses.matching import match
from medvlp.losses.normalise import at_least_float32


def reorder(predicted: Tensor, target: Tensor, wrong_permutation: bool = False) -> Tensor:
    """Put the predictions of each sample into the order of the targets they match.

    The pairs have the least sum of L1 distances (`match`, which waits for the device once); the choice gets
    no gradient.

    Args:
        predicted, target: [B, N, D].
        wrong_permutation: apply the permutation where its inverse belongs (PRIOR's published code).

    Returns:
        [B, N, D] predictions, row j the one for target j.
    """
    with torch.no_grad():
        cost = torch.cdist(at_least_float32(predicted), at_least_float32(target), p=1)
        everything = torch.ones(cost.shape[0], cost.shape[2], dtype=torch.bool, device=cost.device)
        order = match(cost, everything)
        if wrong_permutation:
            order = order.argsort(1)
    return predicted.gather(1, order[:, :, None].expand_as(predicted))


def set_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of each sample's set to its target, both in one order.

    Args:
        predicted, target: [B, N, D].

    Returns:
        [B] distances in float32 or better.
    """
    return (at_least_float32(predicted) - at_least_float32(target)).abs().mean((1, 2))

"""PRIOR's small parts: a linear projection, a learned scale, and the order in which patches lie in memory."""

import math

import torch
from torch import Tensor, nn

from medvlp.encoders.batch_norm import GlobalBatchNorm
from medvlp.methods.prior.config import PRIORConfig


class LinearHead(nn.Module):
    """Linear, started so that it keeps the length of its input, and a batch norm without affine if asked.

    The batch norm removes what all samples have in common. Untrained encoders give vectors of nearly one
    direction, on which a contrast has hardly a gradient.

    Args:
        width: of the input; output: of the embedding.
        normalise: add the batch norm.
        synchronise: batch-norm statistics over all ranks.
    """

    def __init__(self, width: int, output: int, normalise: bool = False, synchronise: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, output)
        nn.init.normal_(self.linear.weight, std=width**-0.5)
        self.norm = GlobalBatchNorm(output, affine=False, synchronise=synchronise) if normalise else None

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, D] or [B, N, D] features -> embeddings of the same leading shape.

        Args:
            features: vectors or tokens.
            mask: bool of the leading shape; other positions do not enter the batch statistics.
        """
        projected: Tensor = self.linear(features)
        if self.norm is None:
            return projected
        normalised: Tensor = self.norm(projected.movedim(-1, 1), mask)
        return normalised.movedim(1, -1)


class LearnedScale(nn.Module):
    """exp(log_scale), the inverse of a temperature, as CLIP learns it.

    Args:
        temperature: positive, what training starts from.
        lowest: the temperature never falls below it; 0: not limited (published).
    """

    def __init__(self, temperature: float, lowest: float = 0.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        self.limit = math.log(1 / lowest) if lowest > 0 else math.inf

    def forward(self, values: Tensor, exponential: bool = True) -> Tensor:
        """Scale values of any shape.

        Args:
            values: float32 or better.
            exponential: false multiplies with the logarithm of the factor (PRIOR's published zero-shot code).
        """
        log_scale = _reflected(self.log_scale, self.limit).to(values.dtype)
        return values * (log_scale.exp() if exponential else log_scale)


def _reflected(value: Tensor, limit: float) -> Tensor:
    """The value, thrown back at the limit as far as it would go beyond.

    A clamp's gradient would be 0 for ever, and letting through what leads back would make it another on each
    division of a batch: parts of a gradient that are cut off one by one do not add up to the whole.
    """
    return torch.where(value > limit, 2 * limit - value, value)


def patch_vectors(local: Tensor, config: PRIORConfig) -> Tensor:
    """[B, P, D] local features in the order of the grid -> the vectors that count as patches.

    With `local_layout: official_view` the buffer of the [B, D, rows, columns] map is cut into P slices, so
    that a vector holds about D / P channels at all places.
    """
    if config.local_layout == "correct":
        return local
    return local.transpose(1, 2).reshape(local.shape)


def feature_map(patches: Tensor, grid: tuple[int, int], config: PRIORConfig) -> Tensor:
    """[B, P, D] patches -> [B, D, rows, columns] for convolutions; mistaken in the same way, or sound."""
    if config.local_layout == "correct":
        return patches.transpose(1, 2).reshape(len(patches), -1, *grid)
    return patches.reshape(len(patches), -1, *grid)

"""A learned factor on similarities."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LearnedScale(nn.Module):
    """exp(log_scale), the inverse of a temperature, as CLIP learns it; not limited.

    Args:
        temperature: positive, what training starts from.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))

    def forward(self, values: Tensor, exponential: bool = True) -> Tensor:
        """Scale values of any shape.

        Args:
            values: float32 or better.
            exponential: false multiplies with the logarithm of the factor (PRIOR's published zero-shot code).
        """
        log_scale = self.log_scale.to(values.dtype)
        return values * (log_scale.exp() if exponential else log_scale)

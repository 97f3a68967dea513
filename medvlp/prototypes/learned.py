"""Prototypes that are weights of the model."""

import math

import torch
from torch import Tensor, nn

from medvlp.losses.normalise import at_least_float32, unit_norm
from medvlp.prototypes.usage import CountedPrototypes


class LearnedPrototypes(CountedPrototypes):
    """K directions; the weight is normalised inside `forward`, never in place.

    Two things measured with DeepSpeed 0.19.8 stand behind this. An in-place normalisation is undone by the
    engine, which keeps its own copy of the weights (and fails under ZeRO-3). Dropping the gradient does
    not freeze a weight under ZeRO: a frozen weight gets gradients of exactly zero here, on which Adam does
    nothing as long as the weight has no decay (`Method.parameters_without_decay`).

    Args:
        count: number of prototypes K; width: D.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, embeddings: Tensor, frozen: bool = False) -> Tensor:
        """[B, D] unit-norm embeddings -> [B, K] cosine similarities in float32 or better.

        Args:
            embeddings: any number of rows.
            frozen: the weight's gradient is zero (it still exists).
        """
        weight = self.weight.detach() + 0.0 * self.weight if frozen else self.weight
        directions = unit_norm(weight)
        embeddings = at_least_float32(embeddings)
        scores = embeddings @ directions.to(embeddings.dtype).T
        if not frozen:
            self.count(scores)
        return scores

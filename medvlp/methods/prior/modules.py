"""A linear projection, optionally followed by a batch norm."""

from __future__ import annotations

from torch import Tensor, nn

from medvlp.encoders.batch_norm import GlobalBatchNorm


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

"""Projection heads between backbones and losses."""

from torch import Tensor, nn

from medvlp.encoders.batch_norm import GlobalBatchNorm


class ProjectionHead(nn.Module):
    """Linear - batch norm - ReLU - Linear - batch norm without affine, on vectors or on tokens.

    Args:
        width: width of the input.
        hidden: width of the middle layer.
        output: width of the embedding.
        synchronise: batch-norm statistics over all ranks.

    (MGCA section 4.1; a 1x1 convolution over tokens is the same linear layer.)
    """

    def __init__(self, width: int, hidden: int, output: int, synchronise: bool = True) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.norm1 = GlobalBatchNorm(hidden, synchronise=synchronise)
        self.linear2 = nn.Linear(hidden, output)
        self.norm2 = GlobalBatchNorm(output, affine=False, synchronise=synchronise)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, D] or [B, N, D] features -> embeddings of the same leading shape (not normalised).

        Args:
            features: vectors or tokens.
            mask: bool of the leading shape; other positions do not enter the batch statistics and come out as
                zeros (where few positions count, scaling the others by 1/deviation can overflow float16).
        """
        hidden = self.linear1(features)
        hidden = self._normalise(self.norm1, hidden, mask).relu()
        return self._normalise(self.norm2, self.linear2(hidden), mask)

    @staticmethod
    def _normalise(norm: GlobalBatchNorm, values: Tensor, mask: Tensor | None) -> Tensor:
        # As rows of channels: torch's kernels would copy tokens with the channels in the middle, each way.
        rows: Tensor = norm(values.flatten(0, -2), None if mask is None else mask.flatten())
        output = rows.view_as(values)
        return output if mask is None else output.masked_fill(~mask[..., None], 0.0)

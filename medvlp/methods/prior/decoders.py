"""From a feature map back to an image: convolutions and nearest-neighbour upsampling."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.encoders.batch_norm import GlobalBatchNorm
from medvlp.encoders.errors import EncoderError


class UpsampleBlock(nn.Module):
    """Upsampling to a fixed size, then twice convolution 3 x 3 - batch norm - ReLU.

    Args:
        channels: of the input; output: channels of the output.
        size: side of the output in pixels.
        synchronise: batch-norm statistics over all ranks.
    """

    def __init__(self, channels: int, output: int, size: int, synchronise: bool) -> None:
        super().__init__()
        self.size = size
        self.conv1 = _convolution(channels, output, synchronise)
        self.conv2 = _convolution(output, output, synchronise)

    def forward(self, features: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, output, size, size]."""
        output: Tensor = self.conv2(self.conv1(F.interpolate(features, size=(self.size, self.size))))
        return output


class UpsamplingDecoder(nn.Module):
    """A grayscale image from a feature map, without skip connections (PRIOR section 3.3, published code).

    The sides double from block to block and end at `size`; the first block also makes up for grids whose
    side is no `size` / 2^n (7 -> 14, 28, 56, 112, 224; 4 -> 7, 14, 28, 56, 112). Channels halve.

    Args:
        channels: of the feature map.
        width: channels of the first block.
        grid: (rows, columns) of the feature map.
        size: side of the image in pixels.
        synchronise: batch-norm statistics over all ranks.

    Raises:
        EncoderError: `width` cannot be halved that often.
    """

    def __init__(
        self, channels: int, width: int, grid: tuple[int, int], size: int, synchronise: bool = True
    ) -> None:
        super().__init__()
        count = max(1, math.ceil(math.log2(size / min(grid))))
        least = 2 ** (count - 1)
        if width < least:
            raise EncoderError(
                f"method.image_decoder_width={width} cannot be halved {count - 1} times, as the way from a "
                f"{grid[0]} x {grid[1]} grid to {size} pixels needs: raise it to at least {least}"
            )
        widths = [channels, *(width // 2**block for block in range(count))]
        sides = [math.ceil(size / 2 ** (count - 1 - block)) for block in range(count)]
        self.blocks = nn.Sequential(
            *(UpsampleBlock(widths[i], widths[i + 1], sides[i], synchronise) for i in range(count))
        )
        self.head = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, channels, rows, columns] -> [B, 1, size, size]."""
        image: Tensor = self.head(self.blocks(features))
        return image


def _convolution(channels: int, output: int, synchronise: bool) -> nn.Sequential:
    convolution = nn.Conv2d(channels, output, 3, padding=1, bias=False)
    return nn.Sequential(convolution, GlobalBatchNorm(output, synchronise=synchronise), nn.ReLU())

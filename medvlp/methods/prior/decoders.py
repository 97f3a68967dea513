"""From patches back to what was seen: an image by upsampling, sentence embeddings by learned queries."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder

from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.batch_norm import GlobalBatchNorm


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


class SentenceDecoder(nn.Module):
    """N queries -> N sentence embeddings in one pass (PRIOR section 3.3, "sentence prototype generation").

    The position and token-type embeddings of the published decoder are learned constants added to learned
    queries; here they are part of the queries. Weights start with BERT's spread of 0.02 at width 768,
    larger for narrower decoders (as the root of the width), which would else begin almost without signal.

    Args:
        width: D of queries, patches and output; queries: N; layers, heads, hidden: of the transformer.
        dropout: of hidden states and attention.
        causal: query i sees only queries up to i (published code; the paper says it does not).

    Raises:
        EncoderError: `heads` does not divide `width`.
    """

    def __init__(
        self,
        width: int,
        queries: int,
        layers: int = 8,
        heads: int = 12,
        hidden: int = 3072,
        dropout: float = 0.1,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise EncoderError(f"method.decoder_heads={heads} does not divide method.embedding={width}")
        self.causal = causal
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        settings = BertConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=hidden,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            is_decoder=True,  # transformers builds the attention to the patches only for decoders
            add_cross_attention=True,
        )
        settings._attn_implementation = "sdpa"
        self.encoder: nn.Module = BertEncoder(settings)  # type: ignore[no-untyped-call]
        spread = 0.02 * (768 / width) ** 0.5
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=spread)
                nn.init.zeros_(module.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, P, D] patches -> [B, N, D] sentence embeddings."""
        return self.decode(self.queries.expand(len(patches), -1, -1), patches)

    def decode(self, queries: Tensor, patches: Tensor) -> Tensor:
        """As `forward`, from [B, N, D] queries."""
        count = queries.shape[1]
        # Always a mask, because without one transformers' decoder layers are causal.
        visible = torch.ones(count, count, dtype=torch.bool, device=queries.device)
        visible = (visible.tril() if self.causal else visible)[None, None]
        hidden = self.dropout(self.norm(queries))
        output: Tensor = self.encoder(
            hidden, attention_mask=visible, encoder_hidden_states=patches
        ).last_hidden_state
        return output

"""Query tokens that read observations out of an image's patches; reports as one vector of many tokens."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvlp.encoders.decoder import DecoderLayer
from medvlp.encoders.positions import sincos_positions


class Observations(NamedTuple):
    """What the queries found (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        features: [B, M, width], one vector for each query.
        attention: [B, M, P] float32 attention of the last layer to the patches, rows sum to 1; None when it
            was not asked for.
    """

    features: Tensor
    attention: Tensor | None = None


class ObservationExtractor(nn.Module):
    """Learned query tokens through a pre-norm transformer decoder over the patches.

    PLACE's "visual pathology observation extractor": that pathology query tokens extract observations from
    the patch tokens is in the paper's abstract; layers, sizes and positions are our reconstruction (DETR's
    design, with fixed sin-cos positions so that any grid works).

    Args:
        patch_width: width of the patch tokens; width: of queries and output.
        queries: number of query tokens M.
        layers, heads: of the decoder.
        positions: add fixed 2-D sin-cos positions to the patches (feature maps of a CNN carry hardly any).
    """

    def __init__(
        self, patch_width: int, width: int, queries: int, layers: int, heads: int, positions: bool = True
    ) -> None:
        super().__init__()
        self.positions = positions
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.patches = nn.Linear(patch_width, width)
        self.memory_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(DecoderLayer(width, width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Tensor, grid: tuple[int, int], attention: bool = False) -> Observations:
        """Observations of [B, P, patch_width] patches on a `grid` of (rows, columns), P = rows * columns."""
        memory = self.patches(patches)
        if self.positions:
            memory = memory + sincos_positions(grid, memory.shape[2], memory.device).to(memory.dtype)
        memory = self.memory_norm(memory)
        queries = self.queries.expand(len(patches), -1, -1)
        weights = None
        for number, layer in enumerate(self.layers, start=1):
            queries, weights = layer(queries, memory, weights=attention and number == len(self.layers))
        return Observations(self.norm(queries), weights)


class TokenPool(nn.Module):
    """Weighted mean of tokens; one linear layer gives the logarithm of each token's weight.

    Starts as the plain mean over the valid tokens.

    Args:
        width: of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """[B, L, width] tokens -> [B, width].

        Args:
            tokens: what is pooled.
            valid: [B, L] bool; other tokens get no weight. The first always takes part, so that a text of
                nothing but padding stays finite.
        """
        first = torch.arange(valid.shape[1], device=valid.device) == 0
        scores = self.score(tokens)[..., 0].float().masked_fill(~(valid | first), -torch.inf)
        weights = scores.softmax(1).to(tokens.dtype)
        pooled: Tensor = weights[:, None] @ tokens
        return pooled[:, 0]

"""MeDSLIP's modules: the gate that splits image tokens into two streams, the queries that read a stream."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvlp.encoders.decoder import DecoderLayer


class Decoded(NamedTuple):
    """What the queries have read (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        features: [B, Q, width], after the final norm.
        attention: [layers, B, Q, T] float32 attention of each layer to the tokens, mean over heads, rows sum
            to 1; None when it was not asked for.
    """

    features: Tensor
    attention: Tensor | None = None


class QueryDecoder(nn.Module):
    """Pre-norm transformer decoder: queries see each other and attend to tokens that are not normalised.

    Args:
        width: of queries and tokens; heads divide it.
        layers, heads: number of them.
        expansion: middle width of the feed-forward parts over `width`.
        dropout: see `DecoderLayer`.

    (The decoder of DETR with the norms in front, as MedKLIP and MeDSLIP use it.)
    """

    def __init__(self, width: int, layers: int, heads: int, expansion: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, width, heads, expansion=expansion, dropout=dropout, activation=nn.ReLU)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, queries: Tensor, tokens: Tensor, attention: bool = False, context: int | None = None
    ) -> Decoded:
        """Let [B, Q, width] queries read [B, T, width] tokens.

        Args:
            queries: what is asked; tokens: of the images.
            attention: also return the attention maps.
            context: only the first `context` queries are seen by others: the rest ask independently of each
                other, each as if it were one of the first. None: every query is seen.
        """
        maps = []
        for layer in self.layers:
            queries, weights = layer(queries, tokens, weights=attention, context=context)
            maps.append(weights)
        return Decoded(self.norm(queries), torch.stack(maps) if attention else None)


class Streams(NamedTuple):
    """Tokens of the two streams, [B, T, width] each (a tuple: ZeRO-3's hooks look inside)."""

    pathology: Tensor
    anatomy: Tensor


class TwoStreams(nn.Module):
    """A gate for every channel of every token; the pathology stream takes what passes, the other the rest.

    Args:
        channels: width of the image tokens.
        width: of both streams' outputs.
        gate: "linear" (published: the gate is not bounded) or "sigmoid" (a share between 0 and 1).
    """

    def __init__(self, channels: int, width: int, gate: str) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels)
        self.bound: nn.Module = nn.Sigmoid() if gate == "sigmoid" else nn.Identity()
        self.pathology = _head(channels, width)
        self.anatomy = _head(channels, width)

    def forward(self, tokens: Tensor) -> Streams:
        """[B, T, channels] image tokens -> the two streams."""
        gate = self.bound(self.gate(tokens))
        return Streams(self.pathology(gate * tokens), self.anatomy((1 - gate) * tokens))


def _head(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, width))

"""MeDSLIP's disentanglement: one gate splits image tokens into a pathology and an anatomy stream."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


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

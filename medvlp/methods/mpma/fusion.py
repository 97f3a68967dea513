"""Memory-augmented cross-modal fusion (MA-CMF): a report reads the image through attention with memory."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from medvlp.encoders.memory_attention import MemoryAttention, SharedMemory, check_heads


class FusionLayer(nn.Module):
    """Pre-norm transformer layer: self-attention, attention to the other modality, feed-forward.

    Args:
        width, context_width: of the tokens and of the other modality's.
        heads, hidden: attention heads and width of the feed-forward part.
        slots: memory slots of the attention to the other modality.
        dropout: of attention, and of what each part adds.
    """

    def __init__(
        self, width: int, context_width: int, heads: int, hidden: int, slots: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = MemoryAttention(width, width, heads, dropout=dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = MemoryAttention(width, context_width, heads, slots, dropout)
        self.forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, T, width] tokens and [B, S, context_width] of the other modality -> [B, T, width].

        `mask` [B, T] and `context_mask` [B, S] bool, true on tokens; None: all are.
        """
        normed = self.self_norm(tokens)
        tokens = tokens + self.dropout(self.self_attention(normed, normed, mask))
        tokens = tokens + self.dropout(self.cross_attention(self.cross_norm(tokens), context, context_mask))
        fused: Tensor = tokens + self.dropout(self.feed_forward(self.forward_norm(tokens)))
        return fused


class MemoryFusion(nn.Module):
    """Layers in which a report's tokens read the image's (MPMA's MA-CMF in our reconstruction).

    Only the name and the purpose of the module, "fully integrates visual information to assist report
    reconstruction", are the paper's.

    Args:
        width, image_width: of report tokens and image tokens.
        layers, heads, hidden, dropout: of the layers.
        memory: "slots" beside the keys and values of every layer; "retrieval" from one matrix shared by
            both modalities, before the first layer; "none", plain cross-attention (the ablation).
        slots: memory slots of each layer, or rows of the shared matrix.
        highest: rows read by retrieval.

    Raises:
        EncoderError: heads that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        image_width: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float = 0.1,
        memory: Literal["slots", "retrieval", "none"] = "slots",
        slots: int = 64,
        highest: int = 32,
    ) -> None:
        super().__init__()
        check_heads("method.fusion_heads", heads, width)
        self.shared = (
            SharedMemory((width, image_width), width, slots, highest, heads)
            if memory == "retrieval"
            else None
        )
        self.type_embedding = nn.Parameter(torch.randn(width) * 0.02)
        of_each = slots if memory == "slots" else 0
        self.layers = nn.ModuleList(
            FusionLayer(width, image_width, heads, hidden, of_each, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, report: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """Fused report tokens.

        Args:
            report: [B, L, width]. image: [B, S, image_width], class token first.
            mask: [B, L] bool, true on tokens; the first of a report always counts.

        Returns:
            [B, L, width], normalised by the last layer norm.
        """
        mask = mask.clone()
        mask[:, 0] = True
        if self.shared is not None:
            report, image = self.shared(report, image)
        report = report + self.type_embedding
        for layer in self.layers:
            report = layer(report, image, mask)
        fused: Tensor = self.norm(report)
        return fused

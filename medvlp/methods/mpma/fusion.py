"""Memory-augmented cross-modal fusion (MA-CMF): a report reads the image through attention with memory."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.encoders.backbones import EncoderError


def check_heads(name: str, heads: int, width: int) -> None:
    """Raise `EncoderError` unless `heads`, the value of the config key `name`, divide `width`."""
    if width % heads:
        raise EncoderError(f"{name}={heads} does not divide the width {width}")


class MemoryAttention(nn.Module):
    """Multi-head attention whose keys and values are joined by learned slots that no input changes.

    Written by hand because torch's own attention module takes no slots and uses its output projection outside
    that projection's call, where ZeRO-3 has not gathered it.

    Args:
        width: of queries and output. context_width: of the tokens that are attended to.
        heads: number of heads, a divisor of `width`.
        slots: number of memory slots; 0: plain attention.
        dropout: of the attention probabilities.

    (Slots, their scale and start: Meshed-Memory Transformer, Cornia et al., CVPR 2020, section 3.1 and its
    published code. That MPMA's memory is of this kind is our reading.)
    """

    def __init__(
        self, width: int, context_width: int, heads: int, slots: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.slots, self.dropout = heads, slots, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.output = nn.Linear(width, width)
        if slots:
            self.memory_key = nn.Parameter(torch.randn(slots, width) / (width // heads))
            self.memory_value = nn.Parameter(torch.randn(slots, width) / slots)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, width] tokens attend to [B, S, context_width] -> [B, T, width].

        `mask` [B, S] bool, true where there is something to attend to; slots always count.
        """
        key, value = self.key(context), self.value(context)
        if self.slots:
            head_width = key.shape[2] // self.heads
            rows = (key.shape[0], -1, -1)
            key = torch.cat([key, (self.memory_key * head_width**0.5).expand(*rows)], 1)
            value = torch.cat([value, (self.memory_value * self.slots**0.5).expand(*rows)], 1)
            if mask is not None:
                mask = F.pad(mask, (0, self.slots), value=True)
        attended = F.scaled_dot_product_attention(
            self._split(self.query(tokens)),
            self._split(key),
            self._split(value),
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output

    def _split(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        return tokens.reshape(batch, count, self.heads, width // self.heads).transpose(1, 2)


class SharedMemory(nn.Module):
    """One matrix that the tokens of both modalities read: each head adds up the rows most like its token.

    Args:
        widths: of the tokens of each modality.
        width: of the rows.
        rows: number of rows. highest: rows each head of a token reads.
        heads: number of heads, a divisor of `width`.

    (Cross-modal memory networks, Chen et al., ACL 2021, "R2Gen-CMN", section 2.2; adding the answer to the
    token instead of replacing it is ours. The other reading of MPMA's memory.)
    """

    def __init__(self, widths: tuple[int, ...], width: int, rows: int, highest: int, heads: int) -> None:
        super().__init__()
        self.heads, self.highest = heads, min(highest, rows)
        self.memory = nn.Parameter(torch.randn(rows, width) / width**0.5)
        self.query = nn.ModuleList(nn.Linear(each, width) for each in widths)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.output = nn.ModuleList(nn.Linear(width, each) for each in widths)

    def forward(self, *modalities: Tensor) -> tuple[Tensor, ...]:
        """[B, T, widths[i]] tokens of each modality -> the same, with what they read added."""
        key, value = self._split(self.key(self.memory)), self._split(self.value(self.memory))
        return tuple(
            tokens + output(self._read(self._split(query(tokens)), key, value))
            for tokens, query, output in zip(modalities, self.query, self.output, strict=True)
        )

    def _read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, heads, T, d] queries, [heads, rows, d] keys and values -> [B, T, heads * d]."""
        scores = (query @ key.transpose(1, 2)).float() / query.shape[-1] ** 0.5
        lowest = scores.topk(self.highest, dim=-1).values[..., -1:]
        weights = scores.masked_fill(scores < lowest, -torch.inf).softmax(-1)
        answers: Tensor = weights.to(value.dtype) @ value
        return answers.transpose(1, 2).flatten(2)

    def _split(self, tokens: Tensor) -> Tensor:
        split = tokens.reshape(*tokens.shape[:-1], self.heads, tokens.shape[-1] // self.heads)
        return split.transpose(-3, -2)


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

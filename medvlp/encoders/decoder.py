"""Pre-norm transformer decoder layers that attend to tokens of another kind."""

import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.losses.normalise import at_least_float32


class Attention(nn.Module):
    """Multi-head attention from queries to a memory.

    Ours, because `nn.MultiheadAttention` uses the weight of its output layer outside that layer's call, where
    ZeRO-3 has not gathered it.

    Args:
        width: of queries and output; memory_width: of the memory.
        heads: number of heads; divides `width`.
        dropout: of the attention, in training.
    """

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width)
        self.value = nn.Linear(memory_width, width)
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, memory: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, N, width] queries and [B, M, memory_width] memory -> [B, N, width].

        Args:
            queries: what attends.
            memory: what is attended to.
            valid: [B, M] bool, memory that may be attended to, at least one for each sample; None: all.
        """
        query, key, value = map(self._by_head, (self.query(queries), self.key(memory), self.value(memory)))
        mask = None if valid is None else valid[:, None, None]
        dropout = self.dropout if self.training else 0.0
        gathered = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        attended: Tensor = self.output(gathered.transpose(1, 2).flatten(2))
        return attended

    def weights(self, queries: Tensor, memory: Tensor) -> Tensor:
        """[B, N, M] float32 attention, mean over heads and without dropout, of the same arguments' call."""
        query, key = (
            self._by_head(at_least_float32(layer(tokens)))
            for layer, tokens in ((self.query, queries), (self.key, memory))
        )
        scores: Tensor = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        return scores.softmax(-1).mean(1)

    def _by_head(self, tokens: Tensor) -> Tensor:
        """[B, N, width] -> [B, heads, N, width / heads]."""
        batch, count, _ = tokens.shape
        return tokens.reshape(batch, count, self.heads, -1).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Self-attention of the queries (where asked for), attention to the memory, feed-forward; all residual.

    Args:
        width: of the queries; memory_width: of the memory.
        heads: of both attentions.
        self_attention: false leaves the first part out.
        expansion: middle width of the feed-forward part over `width`.
        dropout: of both attentions, of the middle of the feed-forward part, and of what each part adds.
        activation: of the feed-forward part.

    (Vaswani et al. 2017, with the norms before each part as in GPT-2.)
    """

    def __init__(
        self,
        width: int,
        memory_width: int,
        heads: int,
        self_attention: bool = True,
        expansion: int = 4,
        dropout: float = 0.0,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width) if self_attention else None
        self.self_attention = Attention(width, width, heads, dropout) if self_attention else None
        self.query_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, memory_width, heads, dropout)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, expansion * width),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(expansion * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        memory: Tensor,
        valid: Tensor | None = None,
        weights: bool = False,
        context: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries after the layer, and their attention to the memory.

        Args:
            queries: [B, N, width]. memory: [B, M, memory_width], already normalised.
            valid: [B, M] bool, memory that may be attended to; None: all.
            weights: also return the attention (computed a second time, without fusion).
            context: only the first `context` queries are seen by the self-attention of all; None: all are.

        Returns:
            [B, N, width], and [B, N, M] float32 attention, mean over heads, or None.
        """
        if self.self_attention is not None and self.self_norm is not None:
            normed = self.self_norm(queries)
            queries = queries + self.dropout(self.self_attention(normed, normed[:, :context]))
        normed = self.query_norm(queries)
        attention = self.cross_attention.weights(normed, memory) if weights else None
        queries = queries + self.dropout(self.cross_attention(normed, memory, valid))
        return queries + self.dropout(self.feed_forward(self.feed_norm(queries))), attention

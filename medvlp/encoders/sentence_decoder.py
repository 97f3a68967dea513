"""Sentence embeddings from an image: learned queries and a BERT decoder that attends to the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder

from medvlp.encoders.errors import EncoderError


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

"""A text encoder whose hidden words are replaced by one learned embedding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from medvlp.config import TextConfig
from medvlp.data.batch import Text
from medvlp.encoders.errors import EncoderError
from medvlp.encoders.text import TextEncoder, TextFeatures


class MaskEmbedding(nn.Module):
    """The learned embedding of a hidden token.

    Args:
        start: [E] first value.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """[B, L, E] token embeddings with those of `hidden` [B, L] bool replaced."""
        return torch.where(hidden[:, :, None], self.weight.to(embedded.dtype), embedded)


class MaskedTextEncoder(TextEncoder):
    """A `TextEncoder` that also takes reports with hidden tokens.

    A token id for [MASK] would need the tokenizer; an embedding of its own does not, and works with
    tokenizers that have no such token.

    Args:
        config: the `text` section.
        vocab_size: number of tokens of the tokenizer.
        mask_token: token whose embedding the mask embedding starts from ([MASK] of a pre-trained model);
            None: the mean of all tokens.

    Raises:
        EncoderError: as `TextEncoder`; no such token; or the model takes no embeddings instead of tokens.
    """

    def __init__(self, config: TextConfig, vocab_size: int, mask_token: int | None = None) -> None:
        super().__init__(config, vocab_size)
        if "inputs_embeds" not in inspect.signature(self.model.forward).parameters:
            raise EncoderError(f"{self._name()} takes no embeddings (inputs_embeds), so no hidden words")
        if mask_token is not None and not 0 <= mask_token < vocab_size:
            raise EncoderError(f"method.mask_token={mask_token} is none of the {vocab_size} tokens")
        table: Any = self.model.get_input_embeddings().weight.detach()
        self.mask_embedding = MaskEmbedding(table.mean(0) if mask_token is None else table[mask_token])
        self.mask_embedding.requires_grad_(not config.frozen)

    def forward(self, text: Text, attention: bool = False, hidden: Tensor | None = None) -> TextFeatures:
        """As `TextEncoder.forward`; tokens in `hidden` ([B, L] bool) enter as the mask embedding.

        `attention` is only for texts without hidden tokens.
        """
        if hidden is None:
            return super().forward(text, attention)
        self.check_length(text)
        embedded = self.model.get_input_embeddings()(text.input_ids)
        return TextFeatures(self._hidden(text, self.mask_embedding(embedded, hidden)))

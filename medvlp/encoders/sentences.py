"""From tokens to sentences: means of the tokens' hidden states, without loops."""

from __future__ import annotations

import torch
from torch import Tensor

from medvlp.data.batch import Text
from medvlp.losses.normalise import at_least_float32


def sentence_means(hidden: Tensor, text: Text, max_sentences: int) -> tuple[Tensor, Tensor]:
    """Mean hidden state of the tokens of each sentence.

    Args:
        hidden: [B, L, D] states of the tokens, of any kind (also after a projection).
        text: the tokens; only `sentence_index` is read. Special tokens and padding belong to no sentence.
        max_sentences: S; sentences with number S or above are left out.

    Returns:
        sentences [B, S, D] in the type of `hidden` (sums are float32 or better), sentence k in slot k, zero
        in empty slots; and valid [B, S] bool, slots of sentences with at least one token. Both shapes
        follow from the arguments alone, so nothing waits for the device and all ranks' shapes agree.
    """
    batch, _, width = hidden.shape
    index = text.sentence_index
    # Tokens outside every kept sentence go to one slot more, which is cut off.
    slot = torch.where((index >= 0) & (index < max_sentences), index, max_sentences)
    values = at_least_float32(hidden)
    sums = values.new_zeros((batch, max_sentences + 1, width))
    sums = sums.scatter_add(1, slot[:, :, None].expand(-1, -1, width), values)
    counts = values.new_zeros((batch, max_sentences + 1)).scatter_add(
        1, slot, torch.ones_like(values[..., 0])
    )
    sums, counts = sums[:, :max_sentences], counts[:, :max_sentences]
    return (sums / counts.clamp(min=1)[:, :, None]).to(hidden.dtype), counts > 0

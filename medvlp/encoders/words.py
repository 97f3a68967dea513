"""From word pieces to words: sums of the pieces' hidden states and attentions, without loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medvlp.data.batch import Text


@dataclass
class Words:
    """The words of a batch of reports; W = L - 1 slots, word 1 of `Text.word_index` in slot 0.

    Attributes:
        report: [B, D] hidden state of [CLS].
        features: [B, W, D] sums of the pieces' hidden states; zero in empty slots.
        attention: [B, W] float32 sums of the pieces' attention from [CLS]; zero in empty slots.
        valid: [B, W] bool, slots that hold a word.
    """

    report: Tensor
    features: Tensor
    attention: Tensor
    valid: Tensor


def aggregate_words(
    hidden: Tensor,
    attention: Tensor,
    text: Text,
    separator_word: bool = False,
    shift_attention: bool = False,
    drop_last_word: bool = False,
) -> Words:
    """Sum hidden states and attentions over the word pieces of each word.

    Args:
        hidden: [B, L, D] hidden states of the tokens.
        attention: [B, L] attention from [CLS] to every token.
        text: the tokens; `word_index` and `sentence_index` are read.
        separator_word: [SEP] counts as a word (published MGCA).
        shift_attention: token i takes the attention of token i + 1 (published MGCA, off by one).
        drop_last_word: reports that fill all L positions lose [SEP] and their last word (published MGCA,
            whose loop ends before it stores them).

    Returns:
        The words. Everything has the shape given by L alone, so nothing waits for the device.
    """
    batch, length, width = hidden.shape
    index = text.word_index
    if drop_last_word:
        last = index[:, -1:]
        index = index.masked_fill((last >= 0) & (index >= (last - 1).clamp(min=1)), -1)
    if not separator_word:
        index = index.masked_fill((index > 0) & (text.sentence_index < 0), -1)
    if shift_attention:
        attention = torch.cat([attention[:, 1:], torch.zeros_like(attention[:, :1])], 1)
    # Tokens outside every word go to one slot more, which is cut off.
    slot = index.masked_fill(index < 0, length)
    features = hidden.new_zeros((batch, length + 1, width))
    features = features.scatter_add(1, slot[:, :, None].expand(-1, -1, width), hidden)
    summed = attention.new_zeros((batch, length + 1)).scatter_add(1, slot, attention)
    filled = torch.zeros((batch, length + 1), dtype=torch.bool, device=hidden.device)
    filled = filled.scatter(1, slot, torch.ones_like(slot, dtype=torch.bool))
    return Words(hidden[:, 0], features[:, 1:length], summed[:, 1:length], filled[:, 1:length])

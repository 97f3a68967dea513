"""From word pieces to words and sentences: hidden states and attentions of theirs together, without loops."""

from dataclasses import dataclass

import torch
from torch import Tensor

from medvlp.data.batch import Text
from medvlp.encoders.hashing import GOLDEN, mix, signed
from medvlp.losses.normalise import at_least_float32


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
    length = hidden.shape[1]
    index = text.word_index
    if drop_last_word:
        last = index[:, -1:]
        index = index.masked_fill((last >= 0) & (index >= (last - 1).clamp(min=1)), -1)
    if not separator_word:
        index = index.masked_fill((index > 0) & (text.sentence_index < 0), -1)
    if shift_attention:
        attention = torch.cat([attention[:, 1:], torch.zeros_like(attention[:, :1])], 1)
    belongs = _belongs(index, 1, length)
    return Words(
        hidden[:, 0],
        belongs.to(hidden.dtype) @ hidden,
        (belongs.to(attention.dtype) @ attention[:, :, None])[:, :, 0],
        belongs.any(2),
    )


def _belongs(index: Tensor, start: int, stop: int) -> Tensor:
    """[B, stop - start, L] bool, which tokens have the numbers `start` to `stop` - 1 in `index` [B, L].

    A product with it sums over tokens: many times as fast as `scatter_add` and its way back, and on a GPU
    always in the same order.
    """
    numbers = torch.arange(start, stop, device=index.device)
    return index[:, None, :] == numbers[:, None]


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
    values = at_least_float32(hidden)
    belongs = _belongs(text.sentence_index, 0, max_sentences).to(values.dtype)
    counts = belongs.sum(2, keepdim=True)
    return (belongs @ values / counts.clamp(min=1)).to(hidden.dtype), counts[:, :, 0] > 0


def sentence_identity(text: Text, max_sentences: int) -> Tensor:
    """A number for each sentence that is equal exactly where the tokens and their order are.

    Args:
        text: the tokens; `input_ids` and `sentence_index` are read. A sentence that is cut is another one.
        max_sentences: S, as in `sentence_means`.

    Returns:
        [B, S] int64 hashes of 64 bits (two different sentences share one by a chance of 1 in 10^19); 0 in
        empty slots.
    """
    index = text.sentence_index
    batch, length = index.shape
    slot = torch.where((index >= 0) & (index < max_sentences), index, max_sentences)
    place = torch.arange(length, device=index.device).expand(batch, -1)
    first = torch.full((batch, max_sentences + 1), length, device=index.device)
    first = first.scatter_reduce(1, slot, place, "amin")
    tokens = mix(text.input_ids + 1 + (place - first.gather(1, slot)) * signed(GOLDEN))
    sums = torch.zeros((batch, max_sentences + 1), dtype=torch.int64, device=index.device)
    return sums.scatter_add(1, slot, tokens)[:, :max_sentences]


def report_identity(text: Text) -> Tensor:
    """[B] int64, equal exactly where the sentences are, in any order (`sentence_identity`); 0 without any."""
    return mix(sentence_identity(text, text.sentence_index.shape[1])).sum(dim=1)

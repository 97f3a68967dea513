"""Which patches and words of a sample are hidden at a step: a function of (seed, step, sample).

Drawn by hashing instead of from torch's generators, so that a sample gets the same masks on every rank layout
and after every resume, as its augmentation does.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from medvlp.data.batch import Text
from medvlp.encoders.hashing import GOLDEN, WORD, finalise, mix, signed

#: Numbers of the independent streams of one sample.
PATCHES, WORDS = 0, 1


class PatchMask(NamedTuple):
    """Patches of each sample, numbered row by row and ascending.

    Attributes:
        visible: [B, V] int64. hidden: [B, P - V] int64.
    """

    visible: Tensor
    hidden: Tensor


def sample_noise(sample: Tensor, count: int, seed: int, step: int, stream: int) -> Tensor:
    """Uniform 64-bit integers for each sample, the same wherever and whenever they are asked for.

    Args:
        sample: [B] int64 numbers of the samples.
        count: numbers of each sample.
        seed, step, stream: non-negative; another value of any gives independent numbers.

    Returns:
        [B, count] int64 over the whole range.
    """
    key = 0
    for part in (seed, step, stream):
        key = finalise((key + GOLDEN + part) % WORD)
    start = mix(sample + signed(key))
    counter = torch.arange(1, count + 1, device=sample.device) * signed(GOLDEN)
    return mix(start[:, None] + counter)


def visible_patches(patches: int, ratio: float) -> int:
    """Patches that stay visible where a share `ratio` in [0, 1) is hidden: whole ones, and at least one."""
    return min(patches, max(1, round(patches * (1 - ratio))))


def draw_patches(noise: Tensor, ratio: float) -> PatchMask:
    """Hide the given share of patches: those with the highest noise.

    Args:
        noise: [B, P] numbers.
        ratio: share of hidden patches, see `visible_patches`.
    """
    visible = visible_patches(noise.shape[1], ratio)
    order = noise.argsort(dim=1)
    return PatchMask(order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values)


def is_word(text: Text) -> Tensor:
    """[B, L] bool, tokens of the report itself: neither [CLS], [SEP] nor padding."""
    return (text.sentence_index >= 0) & (text.attention_mask > 0)


def draw_words(text: Text, noise: Tensor, ratio: float) -> Tensor:
    """Hide the given share of each report's words, all pieces of a word together.

    Args:
        text: the reports; `word_index`, `sentence_index` and `attention_mask` are read.
        noise: [B, L] numbers, one for each possible word.
        ratio: share of hidden words in [0, 1]; rounded half up to whole words. With a ratio above 0 at least
            one word is hidden, and one always stays visible: the only word of a report does.

    Returns:
        [B, L] bool, true on hidden tokens; never on [CLS], [SEP] or padding.
    """
    words = is_word(text)
    length = words.shape[1]
    # Tokens outside every word go to one slot more, which is cut off.
    slot = text.word_index.masked_fill(~words, length)
    exists = words.new_zeros((words.shape[0], length + 1))
    exists = exists.scatter(1, slot, torch.ones_like(words))[:, :length]
    number = exists.sum(1)
    hidden = (number * ratio + 0.5).floor().long()
    if ratio > 0:
        hidden = hidden.clamp(min=1).minimum((number - 1).clamp(min=0))
    # Words that do not exist come last.
    place = noise.masked_fill(~exists, torch.iinfo(torch.int64).max).argsort(dim=1).argsort(dim=1)
    chosen = exists & (place < hidden[:, None])
    return words & chosen.gather(1, slot.clamp(max=length - 1))


def most_scored(length: int, ratio: float) -> int:
    """How many of a report's `length` tokens are scored at most, where `ratio` of its words are hidden."""
    return min(length, int(length * ratio) + length // 8 + 8)


def scored_positions(text: Text, hidden: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Where hidden tokens are predicted: as many positions as reports of such lengths can need.

    The lengths that the host knows (`Text.lengths`) say how many, so that nothing waits for the device.

    Args:
        text: the reports. hidden: [B, L] bool, from `draw_words` with `ratio`.

    Returns:
        places [T] int64, positions among all B * L with the scored ones first, and [T] bool, which of them
        are scored. A report of m tokens has at most ratio * m + m / 8 + 8 scored ones, whatever the padding;
        more are hidden only where few long words were drawn.
    """
    tokens = is_word(text).sum(1, keepdim=True)
    most = (tokens.double() * ratio).long() + tokens // 8 + 8
    scored = (hidden & (hidden.cumsum(1) <= most)).flatten()
    lengths = text.lengths or (hidden.shape[1],) * len(hidden)
    slots = sum(most_scored(length, ratio) for length in lengths)
    places = scored.byte().argsort(descending=True, stable=True)[:slots]
    return places, scored[places]

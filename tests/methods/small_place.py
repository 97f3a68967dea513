"""A small PLACE and batches of several sentences for it."""

from __future__ import annotations

from typing import Any

import torch

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.methods.pair import PairMethod
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.registry import build_method
from tests.methods import small_mgca
from tests.methods.small_mgca import VOCABULARY, small_batch

SMALL: dict[str, Any] = {
    "embedding": 8,
    "head_hidden": 16,
    "queries": 4,
    "query_layers": 2,
    "decoder_width": 16,
    "decoder_heads": 2,
    "max_sentences": 5,
    "patch_drop": 0.0,
}


def small_config(image: str = "vit", **method: Any) -> Config:
    """A config whose method builds in a moment; dropout is off."""
    config = small_mgca.small_config(image)
    config.method = PLACEConfig(**{**SMALL, **method})
    return config


def small_place(image: str = "vit", seed: int = 0, **method: Any) -> PairMethod:
    """The method of `small_config` with weights from `seed`."""
    torch.manual_seed(seed)
    built = build_method(small_config(image, **method), VOCABULARY)
    assert isinstance(built, PairMethod)
    return built


def report_batch(reports: list[list[int]], length: int = 14, seed: int = 0) -> Batch:
    """A batch whose report i has sentences of `reports[i]` words each, one token a word.

    A report without sentences is nothing but padding.
    """
    batch = small_batch([sum(words) or -1 for words in reports], length, seed)
    text = batch.text
    for row, words in enumerate(reports):
        tokens = (text.sentence_index[row] >= 0).nonzero()[:, 0]
        numbers = torch.repeat_interleave(torch.arange(len(words)), torch.tensor(words, dtype=torch.long))
        word = text.word_index[row, tokens] - 1
        text.sentence_index[row, tokens] = numbers[word]
    return batch

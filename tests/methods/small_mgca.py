"""A small MGCA and batches for it, shared by the tests of this folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.pair import PairMethod
from medvlp.methods.registry import build_method

VOCABULARY = 60
SIZE = 32
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "vit_tiny_patch16_224",
        "options": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    },
    "resnet": {
        "name": "resnet10t",
        "options": {"channels": [8, 8, 16, 16], "stem_width": 8},
        "local_stage": 3,
    },
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def small_config(image: str = "vit", **method: Any) -> Config:
    """A config whose method builds in a moment; dropout is off."""
    config = Config()
    config.data.image_size, config.data.max_tokens = SIZE, 16
    config.image = dataclasses.replace(config.image, **IMAGES[image])
    config.text.options, config.text.dropout = TEXT, 0.0
    defaults: dict[str, Any] = {"embedding": 8, "head_hidden": 16, "prototypes": 6}
    config.method = MGCAConfig(**{**defaults, **method})
    return config


def small_mgca(image: str = "vit", seed: int = 0, **method: Any) -> PairMethod:
    """The method of `small_config` with weights from `seed`."""
    torch.manual_seed(seed)
    built = build_method(small_config(image, **method), VOCABULARY)
    assert isinstance(built, PairMethod)
    return built


def small_batch(words: list[int], length: int = 12, seed: int = 0) -> Batch:
    """A batch whose report i has `words[i]` words (every third has a second piece, if there is room).

    A report with -1 words is nothing but padding.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(words)
    word_index = torch.full((count, length), -1)
    sentence_index = torch.full((count, length), -1)
    for row, number in enumerate(words):
        if number < 0:
            continue
        index = [0]
        for word in range(1, number + 1):
            index += [word] * (2 if word % 3 == 0 and length > number + 6 else 1)
        word_index[row, : len(index) + 1] = torch.tensor([*index, index[-1] + 1])
        sentence_index[row, 1 : len(index)] = 0
    mask = (word_index >= 0).long()
    ids = torch.randint(5, VOCABULARY, (count, length), generator=generator) * mask
    image = torch.randint(0, 256, (count, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    text = Text(ids, mask, word_index, sentence_index)
    return Batch(image, text, torch.arange(count), torch.zeros(count, 1), [str(i) for i in range(count)])


def rows_of(batch: Batch, start: int, stop: int, trim: bool = True) -> Batch:
    """Samples start..stop-1, padded only to the longest of them when `trim`."""
    length = (
        int(batch.text.attention_mask[start:stop].sum(1).max()) if trim else batch.text.input_ids.shape[1]
    )
    text = Text(*(value[start:stop, :length] for value in batch.text.tensors().values()))
    return Batch(
        batch.image[start:stop],
        text,
        batch.sample[start:stop],
        batch.labels[start:stop],
        batch.keys[start:stop],
        fields={name: value[start:stop] for name, value in batch.fields.items()},
    )

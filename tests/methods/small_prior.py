"""A small PRIOR and batches of reports with sentences, shared by its tests."""

from __future__ import annotations

from typing import Any

import torch

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.methods.pair import PairMethod
from medvlp.methods.prior.config import PRIORConfig
from medvlp.methods.prior.method import PRIOR
from medvlp.methods.registry import build_method
from tests.methods.small_mgca import SIZE, VOCABULARY, small_config

SMALL: dict[str, Any] = {
    "embedding": 16,
    "pool_heads": 2,
    "prototypes": 6,
    "queries": 4,
    "decoder_layers": 2,
    "decoder_heads": 2,
    "decoder_hidden": 32,
    "decoder_dropout": 0.0,
    "channel_dropout": 0.0,
    "image_decoder_width": 32,
    "bank_noise": "never",
}


def small_prior_config(image: str = "vit", **method: Any) -> Config:
    """A config whose PRIOR builds in a moment; dropout and noise are off."""
    config = small_config(image)
    config.image.local_stage = None
    config.method = PRIORConfig(**{**SMALL, **method})
    return config


def small_prior(image: str = "vit", seed: int = 0, **method: Any) -> PairMethod:
    """The method of `small_prior_config` with weights from `seed`."""
    torch.manual_seed(seed)
    built = build_method(small_prior_config(image, **method), VOCABULARY)
    assert isinstance(built, PairMethod)
    assert isinstance(built.alignment, PRIOR)
    return built


def report_batch(reports: list[list[int]], length: int = 14, seed: int = 0) -> Batch:
    """A batch whose report i has sentences of `reports[i][k]` words each; [] is nothing but padding."""
    generator = torch.Generator().manual_seed(seed)
    word = torch.full((len(reports), length), -1)
    sentence = word.clone()
    for row, report in enumerate(reports):
        numbers = [number for number, words in enumerate(report) for _ in range(words)][: length - 2]
        if report:
            word[row, : len(numbers) + 2] = torch.arange(len(numbers) + 2)
            sentence[row, 1 : len(numbers) + 1] = torch.tensor(numbers)
    mask = (word >= 0).long()
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator) * mask
    image = torch.randint(0, 256, (len(reports), 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    count = torch.arange(len(reports))
    return Batch(
        image, Text(ids, mask, word, sentence), count, torch.zeros(len(reports), 1), list(map(str, count))
    )

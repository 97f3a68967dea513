"""A small MPMA, shared by its tests; batches come from `small_mgca`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from medvlp.config import Config
from medvlp.methods.mpma.config import MPMAConfig
from medvlp.methods.mpma.method import MPMA
from medvlp.methods.registry import build_method
from tests.methods.small_mgca import IMAGES, SIZE, TEXT, VOCABULARY

SMALL: dict[str, Any] = {
    "name": "mpma",
    "embedding": 8,
    "head_hidden": 16,
    "fusion_layers": 2,
    "fusion_heads": 2,
    "fusion_hidden": 32,
    "fusion_dropout": 0.0,
    "memory_slots": 4,
    "memory_highest": 2,
    "decoder_width": 16,
    "decoder_layers": 1,
    "decoder_heads": 2,
}


def small_config(**method: Any) -> Config:
    """A config whose method builds in a moment; dropout is off."""
    config = Config()
    config.data.image_size, config.data.max_tokens = SIZE, 16
    config.image = dataclasses.replace(config.image, **IMAGES["vit"])
    config.text.options, config.text.dropout = dict(TEXT), 0.0
    config.method = MPMAConfig(**{**SMALL, **method})
    return config


def small_mpma(seed: int = 0, **method: Any) -> MPMA:
    """The method of `small_config` with weights from `seed`."""
    torch.manual_seed(seed)
    built = build_method(small_config(**method), VOCABULARY)
    assert isinstance(built, MPMA)
    return built

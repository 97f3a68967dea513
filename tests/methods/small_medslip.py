"""A small MeDSLIP and batches for it, shared by the tests of this folder."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import tokenizers
import torch
from torch import Tensor

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.data.text import Tokenizer
from medvlp.methods.medslip.config import MeDSLIPConfig
from medvlp.methods.medslip.method import MeDSLIP
from medvlp.methods.registry import build_method
from shards.entities.vocabulary import ANATOMIES, DESCRIPTIONS, OBSERVATIONS
from tests.methods.small_mgca import IMAGES, SIZE

#: Long enough for every sentence of the book.
MAX_TOKENS = 32


@cache
def tokenizer() -> Tokenizer:
    """A WordPiece tokenizer that knows every word of the book."""
    pre = tokenizers.pre_tokenizers.BertPreTokenizer()
    texts = [*DESCRIPTIONS.values(), *(f"It is located at {name}." for name in ANATOMIES)]
    words = sorted({word for text in texts for word, _ in pre.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre
    return Tokenizer(backend)


def small_config(image: str = "resnet", **method: Any) -> Config:
    """A config whose method builds in a moment; dropout is off and the negatives are all there are."""
    config = Config()
    config.data.image_size, config.data.max_tokens = SIZE, MAX_TOKENS
    config.image = dataclasses.replace(config.image, **IMAGES[image])
    config.text.options = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": MAX_TOKENS, "initializer_range": 0.5,
    }  # fmt: skip
    config.text.frozen = True
    defaults: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "dropout": 0.0}
    config.method = MeDSLIPConfig(**{**defaults, "prototype_negatives": len(OBSERVATIONS), **method})
    return config


def small_medslip(image: str = "resnet", seed: int = 0, **method: Any) -> MeDSLIP:
    """The method of `small_config` with weights from `seed` and a written book."""
    torch.manual_seed(seed)
    built = build_method(small_config(image, **method), tokenizer().vocab_size)
    assert isinstance(built, MeDSLIP)
    built.prepare(tokenizer())
    return built


def random_matrix(count: int, seed: int = 0, mentioned: float = 0.02) -> Tensor:
    """[count, 51, 75] int8 matrices of which about `mentioned` are 0 or 1, half of each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, len(ANATOMIES), len(OBSERVATIONS))
    values = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return values.masked_fill(torch.rand(shape, generator=generator) >= mentioned, -1)


def small_batch(matrix: Tensor, seed: int = 0) -> Batch:
    """A batch of random images with the given [B, 51, 75] matrices; its reports are one word each."""
    count = len(matrix)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (count, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    text = tokenizer().tokenize([["lung"]] * count, MAX_TOKENS)
    keys = [str(number) for number in range(count)]
    return Batch(image, text, torch.arange(count), torch.zeros(count, 1), keys, fields={"entities": matrix})
